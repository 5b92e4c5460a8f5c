# Command:  mmdetection's tools/train.py configs/mmdet/cascade_mask_rcnn.py
# Hardware: 8 GPUs x 2 images; the authors' model of GPU and time are not published
# Score:    52.2 box AP, 45.1 mask AP, COCO val2017
# Status:   published figure of the authors' code (mmdet 2); not run here
_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "./coco_3x.py"]
from foveal.heads.mmdet import completed  # noqa: E402  (mmengine reads a file that imports first as another format)

custom_imports = dict(imports=["foveal.heads.mmdet"])
model = completed(
    dict(
        backbone=dict(
            _delete_=True,
            type="FovealBackbone",
            name="dinat_tiny",
            pretrained=True,
            drop_path_rate=0.3,
            # for maps of 800-pixel images
            dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]],
        ),
        roi_head=dict(
            bbox_head=[
                dict(
                    type="Shared4Conv1FCBBoxHead",
                    in_channels=256,
                    conv_out_channels=256,
                    fc_out_channels=1024,
                    roi_feat_size=7,
                    num_classes=80,
                    bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=stds),
                    reg_class_agnostic=False,
                    reg_decoded_bbox=True,
                    norm_cfg=dict(type="SyncBN", requires_grad=True),
                    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                    loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
                )
                for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
            ]
        ),
    )
)
