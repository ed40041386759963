"""What a module's tensors cannot tell, in the metadata of its state dict: torch.save keeps it, and who does not know it passes it by."""

from __future__ import annotations

from torch import nn


class ToldInMetadata(nn.Module):
    """Writes its attributes ``told`` beside its tensors, and refuses a state dict that says others; one that says nothing is taken."""

    told: tuple[str, ...] = ("num_heads",)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})  # state_dict(destination=…) may be given a plain dict
        metadata.setdefault(prefix[:-1], {}).update({name: getattr(self, name) for name in self.told})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        for name in self.told:
            own, theirs = getattr(self, name), local_metadata.get(name)
            if theirs is not None and theirs != own:
                where = f"{type(self).__name__} {prefix[:-1]}".strip()
                error_msgs.append(f"{where}: the state dict was saved with {name}={theirs!r}, this module has {name}={own!r}.")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
