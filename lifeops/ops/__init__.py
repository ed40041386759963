"""The ops, a folder for each family: the executable specifications in ``spec``, what users call in ``function`` or ``public``.

A new op is one file and one line here.
"""

import lifeops.ops.channel.act
import lifeops.ops.dw_shortcut.spec
import lifeops.ops.life_qkv.spec
import lifeops.ops.local_attention.cpu
import lifeops.ops.local_attention.spec
import lifeops.ops.rollout_step
import lifeops.ops.token_conv.spec
import lifeops.ops.token_dwconv.act_bwd_spec
import lifeops.ops.token_dwconv.act_spec
import lifeops.ops.token_dwconv.spec
import lifeops.ops.token_pool.spec  # noqa: F401
