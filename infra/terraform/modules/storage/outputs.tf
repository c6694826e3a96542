output "bucket" {
  description = "Name of the bucket."
  value       = aws_s3_bucket.this.id
}

output "bucket_arn" {
  description = "Its ARN, for roles."
  value       = aws_s3_bucket.this.arn
}
