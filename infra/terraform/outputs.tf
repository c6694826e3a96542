# What infra/fill.py puts into cluster/aws.yaml, under the same names. No secret is among them: `secret_arn` says where
# the database's password lies, and only the nodes' roles may read it there.

output "name" {
  description = "The cluster's name, and the tag that the head's role is bound to."
  value       = var.name
}

output "region" {
  description = "Where everything is."
  value       = var.region
}

output "availability_zones" {
  description = "Zones that nodes may start in, with commas, as Ray writes them."
  value       = join(",", var.availability_zones)
}

output "bucket" {
  description = "The bucket; a run's `storage` is s3://BUCKET/NAME."
  value       = module.storage.bucket
}

output "private_subnet_ids" {
  description = "Subnets of the nodes, one in each zone; without public addresses."
  value       = module.network.private_subnet_ids
}

output "nodes_group_id" {
  description = "Security group of the nodes."
  value       = module.network.nodes_group_id
}

output "head_profile_arn" {
  description = "Instance profile of the head."
  value       = module.identity.head_profile_arn
}

output "worker_profile_arn" {
  description = "Instance profile of teachers and students."
  value       = module.identity.worker_profile_arn
}

output "database_host" {
  description = "Address of PostgreSQL, reached from the nodes alone."
  value       = module.database.host
}

output "secret_arn" {
  description = "Where AWS keeps the database's password, which it made and rotates."
  value       = module.database.secret_arn
}

output "image_id" {
  description = "Machine image of the nodes."
  value       = var.image_id == null ? nonsensitive(data.aws_ssm_parameter.image[0].value) : var.image_id
}
