output "host" {
  description = "Address of the server; the port is 5432."
  value       = aws_db_instance.this.address
}

output "secret_arn" {
  description = "Where the password lies."
  value       = aws_db_instance.this.master_user_secret[0].secret_arn
}
