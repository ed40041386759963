"""The ops, one executable specification per file. A new op is one file and one line here."""

from lifeops.ops import channel_act as channel_act
from lifeops.ops import dw_shortcut_step as dw_shortcut_step
from lifeops.ops import life_qkv as life_qkv
from lifeops.ops import local_attention as local_attention
from lifeops.ops import local_attention_cpu as local_attention_cpu
from lifeops.ops import rollout_step as rollout_step
from lifeops.ops import token_dwconv as token_dwconv
from lifeops.ops import token_dwconv_act as token_dwconv_act
