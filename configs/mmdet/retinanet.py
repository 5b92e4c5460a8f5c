# Command:  mmdetection's tools/train.py configs/mmdet/retinanet.py
# Score:    not published for this backbone
# Status:   an example of A3-FPN; not run here
_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "./coco_3x.py"]
from foveal.heads.mmdet import completed  # noqa: E402  (mmengine reads a file that imports first as another format)

custom_imports = dict(imports=["foveal.heads.mmdet"])
model = completed(
    dict(
        backbone=dict(
            _delete_=True, type="FovealBackbone", name="dinat_mini", pretrained=True, drop_path_rate=0.2, sync_bn=True
        ),
        neck=dict(_delete_=True, type="A3FPN", start_level=1, extra_levels="p6p7", sync_bn=True),
    )
)
