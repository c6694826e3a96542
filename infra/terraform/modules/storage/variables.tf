variable "bucket" {
  description = "Name of the bucket, unique in all of AWS."
  type        = string
}

variable "kms_key_arn" {
  description = "Key that encrypts what is written; null takes the key that S3 keeps (AES256)."
  type        = string
  default     = null
}

variable "noncurrent_days" {
  description = "Days that an overwritten or deleted object can still be brought back."
  type        = number
}

variable "protect" {
  description = "Refuse to destroy the bucket while it holds objects."
  type        = bool
}
