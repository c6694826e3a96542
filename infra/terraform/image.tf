# The image that nodes start from. Its id is looked up once and written into the filled cluster file, so a cluster keeps
# its image until that file is made again.

data "aws_ssm_parameter" "image" {
  count = var.image_id == null ? 1 : 0

  name = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-al2023/latest/ami-id"
}
