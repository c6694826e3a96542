variable "name" {
  description = "Name of everything that is made, and value of the tag that the head may start and end machines under; the cluster_name in cluster/aws.yaml."
  type        = string
  default     = "raystill"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.name))
    error_message = "name: 2 to 31 lower-case letters, digits and dashes, a letter first."
  }
}

variable "region" {
  description = "AWS region of everything; pick one where the cards that `raystill plan` names are to be had."
  type        = string
  default     = "us-east-1"
}

variable "availability_zones" {
  description = "Two or more zones of the region: machines start in the first that has them, and the database wants two."
  type        = list(string)
  default     = ["us-east-1a", "us-east-1b"]

  validation {
    condition     = length(var.availability_zones) >= 2
    error_message = "availability_zones: name at least two; a database subnet group needs them."
  }
}

variable "cidr" {
  description = "Addresses of the network, a /16 that meets no other network that it will be joined to."
  type        = string
  default     = "10.42.0.0/16"
}

variable "bucket" {
  description = "Name of the bucket for corpora, labels, checkpoints and models; unique in all of AWS."
  type        = string
}

variable "kms_key_arn" {
  description = "Key that encrypts the bucket and the database; null takes the keys that AWS keeps for S3 and RDS."
  type        = string
  default     = null
}

variable "noncurrent_days" {
  description = "Days that an overwritten or deleted object can still be brought back."
  type        = number
  default     = 30
}

variable "database_instance_class" {
  description = "Size of the PostgreSQL server for MLflow and for promotions; both are small."
  type        = string
  default     = "db.t4g.medium"
}

variable "database_storage_gb" {
  description = "Disk of the database in gigabytes at the start; it grows to ten times that by itself."
  type        = number
  default     = 20
}

variable "database_backup_days" {
  description = "Days that automatic backups of the database are kept."
  type        = number
  default     = 7
}

variable "database_multi_zone" {
  description = "Whether the database has a standby in a second zone; it costs as much again."
  type        = bool
  default     = false
}

variable "protect" {
  description = "Refuse to destroy the bucket while it holds objects, and the database at all. Set to false, and apply, before a teardown."
  type        = bool
  default     = true
}

variable "image_id" {
  description = "Machine image of the nodes; null takes AWS's current Deep Learning base image (Amazon Linux 2023, NVIDIA driver)."
  type        = string
  default     = null
}
