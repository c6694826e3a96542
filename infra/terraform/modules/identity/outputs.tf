output "head_profile_arn" {
  description = "Instance profile of the head."
  value       = aws_iam_instance_profile.head.arn
}

output "worker_profile_arn" {
  description = "Instance profile of teachers and students."
  value       = aws_iam_instance_profile.worker.arn
}
