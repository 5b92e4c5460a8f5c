# Command:  mmdetection's tools/train.py configs/mmdet/mask_rcnn.py
# Hardware: 8 GPUs x 2 images; the authors' model of GPU and time are not published
# Score:    48.6 box AP, 43.5 mask AP, COCO val2017
# Status:   published figure of the authors' code (mmdet 2); not run here
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "./coco_3x.py"]
from foveal.heads.mmdet import completed  # noqa: E402  (mmengine reads a file that imports first as another format)

custom_imports = dict(imports=["foveal.heads.mmdet"])
model = completed(
    dict(
        backbone=dict(
            _delete_=True,
            type="FovealBackbone",
            name="dinat_tiny",
            pretrained=True,
            drop_path_rate=0.2,
            # for maps of 800-pixel images
            dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]],
        )
    )
)
