variable "name" {
  description = "Begins the name of everything here."
  type        = string
}

variable "region" {
  description = "Region, for the address of S3's gateway."
  type        = string
}

variable "cidr" {
  description = "Addresses of the network, a /16."
  type        = string
}

variable "availability_zones" {
  description = "Zones with a private subnet each; the first also has the way out."
  type        = list(string)
}
