output "vpc_id" {
  description = "The network."
  value       = aws_vpc.this.id
}

output "private_subnet_ids" {
  description = "Subnets without public addresses, in the order of the zones."
  value       = aws_subnet.private[*].id
}

output "private_subnet_arns" {
  description = "The same as ARNs, for roles."
  value       = aws_subnet.private[*].arn
}

output "nodes_group_id" {
  description = "Security group of all nodes."
  value       = aws_security_group.nodes.id
}

output "nodes_group_arn" {
  description = "The same as ARN, for roles."
  value       = aws_security_group.nodes.arn
}
