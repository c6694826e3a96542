variable "name" {
  description = "Begins the name of every role, and is the cluster's tag: the head may end machines that carry it and no others."
  type        = string
}

variable "region" {
  description = "The only region that the head may start machines in."
  type        = string
}

variable "bucket_arn" {
  description = "The bucket that nodes read and write."
  type        = string
}

variable "kms_key_arn" {
  description = "Key that encrypts the bucket, if it is not S3's own."
  type        = string
  default     = null
}

variable "secret_arn" {
  description = "The database's password, which nodes may read."
  type        = string
}

variable "subnet_arns" {
  description = "Subnets that the head may start machines in."
  type        = list(string)
}

variable "nodes_group_arn" {
  description = "Security group that it gives them."
  type        = string
}
