# What runs this. The state holds names and addresses and no password; keep it in a bucket of its own with a lock all
# the same, by these lines inside of the block:
#   backend "s3" {
#     bucket       = "<a bucket for states>"
#     key          = "raystill.tfstate"
#     region       = "<its region>"
#     use_lockfile = true
#   }
terraform {
  required_version = ">= 1.9"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.0"
    }
  }
}

provider "aws" {
  region = var.region

  default_tags {
    tags = {
      project = var.name
    }
  }
}
