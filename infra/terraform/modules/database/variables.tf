variable "name" {
  description = "Begins the name of everything here."
  type        = string
}

variable "vpc_id" {
  description = "The network."
  type        = string
}

variable "subnet_ids" {
  description = "Private subnets in two zones or more."
  type        = list(string)
}

variable "client_group_id" {
  description = "Security group whose machines may connect; no other may."
  type        = string
}

variable "instance_class" {
  description = "Size of the server."
  type        = string
}

variable "storage_gb" {
  description = "Disk at the start, in gigabytes."
  type        = number
}

variable "backup_days" {
  description = "Days that automatic backups are kept."
  type        = number
}

variable "multi_zone" {
  description = "Whether there is a standby in a second zone."
  type        = bool
}

variable "kms_key_arn" {
  description = "Key that encrypts disk and backups; null takes the one that RDS keeps."
  type        = string
  default     = null
}

variable "protect" {
  description = "Refuse to delete the server, and keep a last snapshot when it is deleted."
  type        = bool
}
