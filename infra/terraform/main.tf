# Bucket, network, roles and database of one raystill cluster. Machines are not made here: `ray up cluster/aws.yaml`
# starts the head, and the head starts and ends the rest.

module "network" {
  source = "./modules/network"

  name               = var.name
  region             = var.region
  cidr               = var.cidr
  availability_zones = var.availability_zones
}

module "storage" {
  source = "./modules/storage"

  bucket          = var.bucket
  kms_key_arn     = var.kms_key_arn
  noncurrent_days = var.noncurrent_days
  protect         = var.protect
}

module "database" {
  source = "./modules/database"

  name            = var.name
  subnet_ids      = module.network.private_subnet_ids
  vpc_id          = module.network.vpc_id
  client_group_id = module.network.nodes_group_id
  instance_class  = var.database_instance_class
  storage_gb      = var.database_storage_gb
  backup_days     = var.database_backup_days
  multi_zone      = var.database_multi_zone
  kms_key_arn     = var.kms_key_arn
  protect         = var.protect
}

module "identity" {
  source = "./modules/identity"

  name            = var.name
  region          = var.region
  bucket_arn      = module.storage.bucket_arn
  kms_key_arn     = var.kms_key_arn
  secret_arn      = module.database.secret_arn
  subnet_arns     = module.network.private_subnet_arns
  nodes_group_arn = module.network.nodes_group_arn
}
