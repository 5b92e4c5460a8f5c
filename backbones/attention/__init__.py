"""Attention modules over feature maps, channels-last. The only folder of the backbones that calls the kernels.

Layout: x is ``[B, H, W, C]``; q, k and v are ``[B, H, W, heads, D]`` with ``C = heads * D``.
"""

from ...kernels.cache import TensorCache as TensorCache
from ...kernels.tracing import is_dynamic as is_dynamic
from ...kernels.tracing import leaves_pytorch as leaves_pytorch
from .agent import AgentAttention2d as AgentAttention2d
from .agent import resampled_positions as resampled_positions
from .aggregated import AggregatedAttention2d as AggregatedAttention2d
from .aggregated import LogPositionBias as LogPositionBias
from .aggregated import without_autocast as without_autocast
from .cross_shaped import CrossShapedAttention2d as CrossShapedAttention2d
from .fan import ChannelMixing2d as ChannelMixing2d
from .fan import ClassAttentionPool as ClassAttentionPool
from .fan import FourierPosition as FourierPosition
from .fan import TokenAwarePooling2d as TokenAwarePooling2d
from .fan import TokenMixing2d as TokenMixing2d
from .fan import attention_diversification_loss as attention_diversification_loss
from .full import SoftmaxAttention2d as SoftmaxAttention2d
from .full import TokenAttention2d as TokenAttention2d
from .full import attend as attend
from .halo import HaloAttention2d as HaloAttention2d
from .halo import RelativeEmbedding as RelativeEmbedding
from .hybrid import GuidedAttention2d as GuidedAttention2d
from .hybrid import HybridAttention2d as HybridAttention2d
from .hybrid import LocallyEnhancedAttention2d as LocallyEnhancedAttention2d
from .hybrid import SelfAttention2d as SelfAttention2d
from .hybrid import merge_ranks as merge_ranks
from .inline import InlineAttention2d as InlineAttention2d
from .manhattan import ManhattanAttention2d as ManhattanAttention2d
from .manhattan import decayed_attention as decayed_attention
from .manhattan import rotate_by_index as rotate_by_index
from .maps import ChannelNorm as ChannelNorm
from .maps import ConvDownsample as ConvDownsample
from .maps import ConvFeedForward as ConvFeedForward
from .maps import DepthwiseConv as DepthwiseConv
from .maps import at_least as at_least
from .maps import channels_last_on_cpu as channels_last_on_cpu
from .maps import map_sizes as map_sizes
from .maps import resized as resized
from .maps import resized_nhwc as resized_nhwc
from .maps import to_multiple as to_multiple
from .maps import to_nchw as to_nchw
from .maps import to_nhwc as to_nhwc
from .mixing import context_mixing as context_mixing
from .neighborhood import NeighborhoodAttention2d as NeighborhoodAttention2d
from .super_token import SuperTokenAttention2d as SuperTokenAttention2d
from .super_token import associate as associate
from .window import FullAttention2d as FullAttention2d
from .window import PartitionAttention2d as PartitionAttention2d
from .window import RelativePositionTable as RelativePositionTable
from .window import ShiftedWindowAttention2d as ShiftedWindowAttention2d
from .window import resample_table as resample_table
from .window import table_by_key as table_by_key
from .window import window_attention as window_attention
