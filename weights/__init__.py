"""Published weights, their conversion into model folders, and export to other runtimes."""

# families that export with dynamic height and width
ANY_SIZE = ("NAT", "DiNAT", "DiNAT_s", "OverLoCK", "CARE", "VAN", "ShiftViT", "RMT", "RaftMLP", "STViT", "SG-Former")
ANY_SIZE += ("TransNeXt", "MoH-ViT", "Triplet", "FAN", "TAP-FAN", "Agent Attention", "InLine")
