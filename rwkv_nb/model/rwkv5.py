"""RWKV-5.2 (x052), deprecated: RWKV-6 with token shifts and decays that no text changes.

Source: Peng et al. 2024, arXiv 2404.05892 ("Eagle"). Its files keep a mix as the share of the token itself.
"""

from ..wkv import wkv5
from . import rwkv6
from .pointwise import token_shift


class TimeMix(rwkv6.TimeMix):
    """Attention's place: receptance, key, value and gate around WKV-5."""

    wkv = staticmethod(wkv5)

    def inputs(self, x, last_x):
        """What receptance, key, value and gate read, [B,T,C] each, and the raw decay [H,N]."""
        mixes = self.time_mix_r, self.time_mix_k, self.time_mix_v, self.time_mix_g
        return *token_shift(x, last_x, *(1 - mix for mix in mixes)), self.time_decay


class ChannelMix(rwkv6.ChannelMix):
    """RWKV-6's."""

    def mixes(self):
        return 1 - self.time_mix_k, 1 - self.time_mix_r
