# Copy to terraform.tfvars and change; variables.tf explains every value.
bucket             = "my-raystill-bucket"
region             = "us-east-1"
availability_zones = ["us-east-1a", "us-east-1b"]
