# Two roles. Workers read and write the bucket and read the database's password. The head may do that too, and start and
# end machines that carry the cluster's tag, in its subnets, with the workers' role. Nobody has a key that could be lost.

data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

locals {
  ec2 = "arn:${data.aws_partition.current.partition}:ec2:${var.region}"
  own = "${local.ec2}:${data.aws_caller_identity.current.account_id}"
}

data "aws_iam_policy_document" "machines" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "data" {
  statement {
    sid       = "ListBucket"
    actions   = ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"]
    resources = [var.bucket_arn]
  }

  statement {
    sid       = "Objects"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = ["${var.bucket_arn}/*"]
  }

  statement {
    sid       = "DatabasePassword"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [var.secret_arn]
  }

  dynamic "statement" {
    for_each = var.kms_key_arn == null ? [] : [var.kms_key_arn]

    content {
      sid       = "BucketKey"
      actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
      resources = [statement.value]
    }
  }
}

data "aws_iam_policy_document" "scale" {
  # These say what there is and cannot be narrowed to resources.
  statement {
    sid = "Look"
    actions = [
      "ec2:DescribeInstances",
      "ec2:DescribeInstanceTypes",
      "ec2:DescribeInstanceStatus",
      "ec2:DescribeImages",
      "ec2:DescribeKeyPairs",
      "ec2:DescribeSecurityGroups",
      "ec2:DescribeSubnets",
    ]
    resources = ["*"]

    condition {
      test     = "StringEquals"
      variable = "aws:RequestedRegion"
      values   = [var.region]
    }
  }

  statement {
    sid       = "StartTagged"
    actions   = ["ec2:RunInstances"]
    resources = ["${local.own}:instance/*"]

    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/ray-cluster-name"
      values   = [var.name]
    }

    condition {
      test     = "StringEquals"
      variable = "ec2:MetadataHttpTokens"
      values   = ["required"]
    }
  }

  statement {
    sid     = "StartWith"
    actions = ["ec2:RunInstances"]
    resources = concat(
      var.subnet_arns,
      [
        var.nodes_group_arn,
        "${local.own}:network-interface/*",
        "${local.own}:volume/*",
        "${local.own}:key-pair/*",
        "${local.own}:spot-instances-request/*",
        "${local.ec2}::image/*",
      ],
    )
  }

  statement {
    sid       = "TagNew"
    actions   = ["ec2:CreateTags"]
    resources = ["${local.own}:instance/*", "${local.own}:volume/*"]

    condition {
      test     = "StringEquals"
      variable = "ec2:CreateAction"
      values   = ["RunInstances"]
    }
  }

  statement {
    sid       = "OwnMachines"
    actions   = ["ec2:CreateTags", "ec2:TerminateInstances"]
    resources = ["${local.own}:instance/*"]

    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/ray-cluster-name"
      values   = [var.name]
    }
  }

  statement {
    sid       = "HandOnWorkerRole"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.worker.arn]

    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "worker" {
  name               = "${var.name}-worker"
  assume_role_policy = data.aws_iam_policy_document.machines.json
}

resource "aws_iam_role" "head" {
  name               = "${var.name}-head"
  assume_role_policy = data.aws_iam_policy_document.machines.json
}

resource "aws_iam_policy" "data" {
  name   = "${var.name}-data"
  policy = data.aws_iam_policy_document.data.json
}

resource "aws_iam_policy" "scale" {
  name   = "${var.name}-scale"
  policy = data.aws_iam_policy_document.scale.json
}

resource "aws_iam_role_policy_attachment" "worker_data" {
  role       = aws_iam_role.worker.name
  policy_arn = aws_iam_policy.data.arn
}

resource "aws_iam_role_policy_attachment" "head_data" {
  role       = aws_iam_role.head.name
  policy_arn = aws_iam_policy.data.arn
}

resource "aws_iam_role_policy_attachment" "head_scale" {
  role       = aws_iam_role.head.name
  policy_arn = aws_iam_policy.scale.arn
}

# Session Manager: how people, and Ray's own ssh, reach a head that has no public address.
resource "aws_iam_role_policy_attachment" "head_sessions" {
  role       = aws_iam_role.head.name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/AmazonSSMManagedInstanceCore"
}

resource "aws_iam_instance_profile" "head" {
  name = "${var.name}-head"
  role = aws_iam_role.head.name
}

resource "aws_iam_instance_profile" "worker" {
  name = "${var.name}-worker"
  role = aws_iam_role.worker.name
}
