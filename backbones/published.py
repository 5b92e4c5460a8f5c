"""What is published of the models here: written by ``python -m foveal.weights.manifest``, do not edit."""

from __future__ import annotations

from typing import Any

# of every row below that does not say otherwise
DEFAULTS: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}

# by family and name, the fields of timm's PretrainedCfg
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "nat": {
        "nat_mini.in1k": {
            "url": "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth",
            "license": "mit",
        },
        "nat_tiny.in1k": {
            "url": "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_tiny.pth",
            "license": "mit",
        },
        "nat_small.in1k": {
            "url": "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_small.pth",
            "license": "mit",
        },
        "nat_base.in1k": {
            "url": "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_base.pth",
            "license": "mit",
        },
        "dinat_mini.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth",
            "hf_hub_id": "shi-labs/dinat-mini-in1k-224",
            "license": "mit",
        },
        "dinat_tiny.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224.pth",
            "hf_hub_id": "shi-labs/dinat-tiny-in1k-224",
            "license": "mit",
        },
        "dinat_small.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_small_in1k_224.pth",
            "license": "mit",
        },
        "dinat_base.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_base_in1k_224.pth",
            "license": "mit",
        },
        "dinat_large.in22k_ft_in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_224.pth",
            "hf_hub_id": "shi-labs/dinat-large-in22k-in1k-224",
            "license": "mit",
        },
        "dinat_large.in22k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth",
            "license": "mit",
            "num_classes": 21841,
        },
        "dinat_large_384.in22k_ft_in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384.pth",
            "hf_hub_id": "shi-labs/dinat-large-in22k-in1k-384",
            "license": "mit",
            "input_size": (3, 384, 384),
            "crop_pct": 1.0,
        },
        "dinat_large_384_11x11.in22k_ft_in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384_11x11.pth",
            "hf_hub_id": "shi-labs/dinat-large-11x11-in22k-in1k-384",
            "license": "mit",
            "input_size": (3, 384, 384),
            "crop_pct": 1.0,
        },
        "dinat_large_384_11x11.in22k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_large_in22k_224_11x11interp.pth",
            "license": "mit",
            "num_classes": 21841,
            "input_size": (3, 384, 384),
            "crop_pct": 1.0,
        },
        "dinat_s_tiny.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_s_tiny_in1k_224.pth",
            "license": "mit",
        },
        "dinat_s_small.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_s_small_in1k_224.pth",
            "license": "mit",
        },
        "dinat_s_base.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_s_base_in1k_224.pth",
            "license": "mit",
        },
        "dinat_s_large.in22k_ft_in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_s_large_in1k_224.pth",
            "license": "mit",
        },
        "dinat_s_large.in22k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224.pth",
            "license": "mit",
            "num_classes": 21841,
        },
        "dinat_s_large_384.in22k_ft_in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_s_large_in1k_384.pth",
            "license": "mit",
            "input_size": (3, 384, 384),
            "crop_pct": 1.0,
        },
        "nat_isotropic_small.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/isotropic/nat_isotropic_small_in1k_224.pth",
            "license": "mit",
        },
        "dinat_isotropic_small.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/isotropic/dinat_isotropic_small_in1k_224.pth",
            "license": "mit",
        },
        "vitrpb_isotropic_small.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/isotropic/vitrpb_small_in1k_224.pth",
            "license": "mit",
        },
        "nat_isotropic_base.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/isotropic/nat_isotropic_base_in1k_224.pth",
            "license": "mit",
        },
        "dinat_isotropic_base.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/isotropic/dinat_isotropic_base_in1k_224.pth",
            "license": "mit",
        },
        "vitrpb_isotropic_base.in1k": {
            "url": "https://shi-labs.com/projects/dinat/checkpoints/isotropic/vitrpb_base_in1k_224.pth",
            "license": "mit",
        },
    },
    "halonet": {
        "halo26t.a1h_in1k": {
            "url": "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/halonet26t_a1h_256-3083328c.pth",
            "hf_hub_id": "timm/halonet26t.a1h_in1k",
            "license": "apache-2.0",
            "input_size": (3, 256, 256),
            "crop_pct": 0.95,
        },
        "halo50ts.a1h_in1k": {
            "url": "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/halonet50ts_a1h2_256-f3a3daee.pth",
            "hf_hub_id": "timm/halonet50ts.a1h_in1k",
            "license": "apache-2.0",
            "input_size": (3, 256, 256),
            "crop_pct": 0.94,
        },
        "sehalo33ts.ra2_in1k": {
            "url": "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/sehalonet33ts_256-87e053f9.pth",
            "hf_hub_id": "timm/sehalonet33ts.ra2_in1k",
            "license": "apache-2.0",
            "input_size": (3, 256, 256),
            "crop_pct": 0.94,
        },
        "eca_haloext26ts.c1_in1k": {
            "url": "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/eca_halonext26ts_c_256-06906299.pth",
            "hf_hub_id": "timm/eca_halonext26ts.c1_in1k",
            "license": "apache-2.0",
            "input_size": (3, 256, 256),
            "crop_pct": 0.94,
        },
        "haloregz_b.ra3_in1k": {
            "url": "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/haloregnetz_c_raa_256-c8ad7616.pth",
            "hf_hub_id": "timm/haloregnetz_b.ra3_in1k",
            "license": "apache-2.0",
            "crop_pct": 0.94,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "lamhalobot50ts_256.a1h_in1k": {
            "url": "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/lamhalobotnet50ts_a1h2_256-fe3d9445.pth",
            "hf_hub_id": "timm/lamhalobotnet50ts_256.a1h_in1k",
            "license": "apache-2.0",
            "input_size": (3, 256, 256),
            "crop_pct": 0.95,
        },
        "halo2bot50ts_256.a1h_in1k": {
            "url": "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/halo2botnet50ts_a1h2_256-fd9c11a3.pth",
            "hf_hub_id": "timm/halo2botnet50ts_256.a1h_in1k",
            "license": "apache-2.0",
            "input_size": (3, 256, 256),
            "crop_pct": 0.95,
        },
    },
    "maxvit": {
        "maxvit_tiny_224.in1k": {
            "hf_hub_id": "timm/maxvit_tiny_tf_224.in1k",
            "license": "apache-2.0",
            "crop_pct": 0.95,
        },
        "maxvit_tiny_384.in1k": {
            "hf_hub_id": "timm/maxvit_tiny_tf_384.in1k",
            "license": "apache-2.0",
            "input_size": (3, 384, 384),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_tiny_512.in1k": {
            "hf_hub_id": "timm/maxvit_tiny_tf_512.in1k",
            "license": "apache-2.0",
            "input_size": (3, 512, 512),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_small_224.in1k": {
            "hf_hub_id": "timm/maxvit_small_tf_224.in1k",
            "license": "apache-2.0",
            "crop_pct": 0.95,
        },
        "maxvit_small_384.in1k": {
            "hf_hub_id": "timm/maxvit_small_tf_384.in1k",
            "license": "apache-2.0",
            "input_size": (3, 384, 384),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_small_512.in1k": {
            "hf_hub_id": "timm/maxvit_small_tf_512.in1k",
            "license": "apache-2.0",
            "input_size": (3, 512, 512),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_base_224.in1k": {
            "hf_hub_id": "timm/maxvit_base_tf_224.in1k",
            "license": "apache-2.0",
            "crop_pct": 0.95,
        },
        "maxvit_base_384.in1k": {
            "hf_hub_id": "timm/maxvit_base_tf_384.in1k",
            "license": "apache-2.0",
            "input_size": (3, 384, 384),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_base_512.in1k": {
            "hf_hub_id": "timm/maxvit_base_tf_512.in1k",
            "license": "apache-2.0",
            "input_size": (3, 512, 512),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_large_224.in1k": {
            "hf_hub_id": "timm/maxvit_large_tf_224.in1k",
            "license": "apache-2.0",
            "crop_pct": 0.95,
        },
        "maxvit_large_384.in1k": {
            "hf_hub_id": "timm/maxvit_large_tf_384.in1k",
            "license": "apache-2.0",
            "input_size": (3, 384, 384),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_large_512.in1k": {
            "hf_hub_id": "timm/maxvit_large_tf_512.in1k",
            "license": "apache-2.0",
            "input_size": (3, 512, 512),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_base_224.in21k": {
            "hf_hub_id": "timm/maxvit_base_tf_224.in21k",
            "license": "apache-2.0",
            "num_classes": 21843,
            "crop_pct": 0.95,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_large_224.in21k": {
            "hf_hub_id": "timm/maxvit_large_tf_224.in21k",
            "license": "apache-2.0",
            "num_classes": 21843,
            "crop_pct": 0.95,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_xlarge_224.in21k": {
            "hf_hub_id": "timm/maxvit_xlarge_tf_224.in21k",
            "license": "apache-2.0",
            "num_classes": 21843,
            "crop_pct": 0.95,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_base_384.in21k_ft_in1k": {
            "hf_hub_id": "timm/maxvit_base_tf_384.in21k_ft_in1k",
            "license": "apache-2.0",
            "input_size": (3, 384, 384),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_base_512.in21k_ft_in1k": {
            "hf_hub_id": "timm/maxvit_base_tf_512.in21k_ft_in1k",
            "license": "apache-2.0",
            "input_size": (3, 512, 512),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_large_384.in21k_ft_in1k": {
            "hf_hub_id": "timm/maxvit_large_tf_384.in21k_ft_in1k",
            "license": "apache-2.0",
            "input_size": (3, 384, 384),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_large_512.in21k_ft_in1k": {
            "hf_hub_id": "timm/maxvit_large_tf_512.in21k_ft_in1k",
            "license": "apache-2.0",
            "input_size": (3, 512, 512),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_xlarge_384.in21k_ft_in1k": {
            "hf_hub_id": "timm/maxvit_xlarge_tf_384.in21k_ft_in1k",
            "license": "apache-2.0",
            "input_size": (3, 384, 384),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
        "maxvit_xlarge_512.in21k_ft_in1k": {
            "hf_hub_id": "timm/maxvit_xlarge_tf_512.in21k_ft_in1k",
            "license": "apache-2.0",
            "input_size": (3, 512, 512),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
    },
    "overlock": {
        "overlock_xt.in1k": {
            "url": "https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_xt_in1k_224.pth",
            "license": "apache-2.0",
            "crop_pct": 0.925,
        },
        "overlock_xt.in1k_reparam": {
            "url": "https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_xt_in1k_224_reparam.pth",
            "license": "apache-2.0",
            "crop_pct": 0.925,
        },
        "overlock_t.in1k": {
            "url": "https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_t_in1k_224.pth",
            "license": "apache-2.0",
            "crop_pct": 0.95,
        },
        "overlock_t.in1k_reparam": {
            "url": "https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_t_in1k_224_reparam.pth",
            "license": "apache-2.0",
            "crop_pct": 0.95,
        },
        "overlock_s.in1k": {
            "url": "https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_s_in1k_224.pth",
            "license": "apache-2.0",
            "crop_pct": 0.95,
        },
        "overlock_s.in1k_reparam": {
            "url": "https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_s_in1k_224_reparam.pth",
            "license": "apache-2.0",
            "crop_pct": 0.95,
        },
        "overlock_b.in1k": {
            "url": "https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_b_in1k_224.pth",
            "license": "apache-2.0",
            "crop_pct": 0.975,
        },
        "overlock_b.in1k_reparam": {
            "url": "https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_b_in1k_224_reparam.pth",
            "license": "apache-2.0",
            "crop_pct": 0.975,
        },
    },
    "care": {
        "care_s0.in1k": {
            "license": "none stated",
        },
        "care_s1.in1k": {
            "license": "none stated",
        },
        "care_s2.in1k": {
            "license": "none stated",
        },
    },
}

# other places of the file, tried after those
MIRRORS: dict[str, tuple[str, ...]] = {
    "nat_mini.in1k": ("hf://shi-labs/nat-mini-in1k-224",),
    "nat_tiny.in1k": ("hf://shi-labs/nat-tiny-in1k-224",),
    "nat_small.in1k": ("hf://shi-labs/nat-small-in1k-224",),
    "nat_base.in1k": ("hf://shi-labs/nat-base-in1k-224",),
    "dinat_small.in1k": ("hf://shi-labs/dinat-small-in1k-224",),
    "dinat_base.in1k": ("hf://shi-labs/dinat-base-in1k-224",),
    "dinat_large.in22k": ("hf://shi-labs/dinat-large-in22k-224",),
}

# of the file, or how it begins
SHA256: dict[str, str] = {
    "halo26t.a1h_in1k": "3083328c",
    "halo50ts.a1h_in1k": "f3a3daee",
    "sehalo33ts.ra2_in1k": "87e053f9",
    "eca_haloext26ts.c1_in1k": "06906299",
    "haloregz_b.ra3_in1k": "c8ad7616",
    "lamhalobot50ts_256.a1h_in1k": "fe3d9445",
    "halo2bot50ts_256.a1h_in1k": "fd9c11a3",
}
