"""Lines of the library that no test runs here, and why, by how they begin; `make coverage` complains of every other one, and of these
once a test runs them.
"""

REASONS: dict[str, dict[str, tuple[str, ...]]] = {
    "needs a CUDA device: tests/test_gpu.py": {
        "kernels/rollout_step.py": (
            'common["maxnreg"] = 255  # unasked, ptxas gives up regis',
        ),
        "lifeops/init/closed_form.py": (
            'raise ValueError(f"{op}: generator must be a CPU generat',
        ),
        "lifeops/integrations/attention_check.py": (
            "return _TF32 + largest_score * 2**-9",
        ),
    },
    "a refusal that no model at hand brings about: the model itself is tried, behind checks of everything that is known of its kind": {
        "lifeops/attention_maps/host_pass.py": (
            'found = f"{type(self.host.trunk).__name__} has no final ',
            'raise ValueError(f"rollout: {found}; give token_logits=…',
        ),
        "lifeops/attention_maps/pass_check.py": (
            'raise ValueError(f"rollout: {path} does not read what {s',
            'raise ValueError(f"rollout: {path} does not pool what {s',
            'raise ValueError(f"rollout: {event.path} moves tokens be',
        ),
        "lifeops/attention_maps/pool_heads.py": (
            'found = f"with {\', \'.join(beside)} beside" if beside els',
            'raise ValueError(f"rollout: {self.path} was called {foun',
            'raise ValueError(f"rollout: {self.path}, the pooling hea',
            'raise ValueError(f"rollout: {path} pools {weights.shape[',
        ),
        "lifeops/attention_maps/pooled_layers.py": (
            'raise ValueError(f"rollout: {path} makes {queries} queri',
        ),
        "lifeops/init/closed_form.py": (
            'raise ValueError(f"{op}: position_embedding must be fini',
        ),
        "lifeops/init/model_pass.py": (
            'raise ValueError(f"{OP}: {p.path} is given {tuple(getatt',
            "except RuntimeError as error:",
            'raise ValueError(f"{OP}: {p.path} cannot be read as plai',
        ),
        "lifeops/init/positions.py": (
            'raise ValueError(f"{OP}: the position embedding {tuple(t',
            "return found._replace(made=lambda: found.patches + found",
        ),
        "lifeops/init/projections.py": (
            'raise ValueError(f"{OP}: {name}: the heads\' total width ',
        ),
        "lifeops/init/verified.py": (
            "n = 0 if place.mask is None else len(place.mask)",
            'where = f"as the {H} x {W} grid in its order (shuffled, ',
            'raise ValueError(f"{OP}: the {n} patches of the embeddin',
            'where = f"tokens {at[0]} to {at[0] + H * W - 1}" if at e',
            'raise ValueError(f"{OP}: {self.layers[0].path} does not ',
            "return found",
            'raise ValueError(f"{OP}: {\', \'.join(missing) or \'no atte',
        ),
        "lifeops/integrations/convert_check.py": (
            'raise ValueError(f"convert: the block of {path} calls it',
            "except TypeError as error:",
            "said = [name for name in _said(args, kwargs) if name not",
            'raise ValueError(f"convert: {path} is handed {\', \'.join(',
            "except (RuntimeError, ValueError) as error:",
            'raise ValueError(f"convert: {path} cannot be read as q, ',
            'raise ValueError(f"convert: {path} makes q, k and v {[tu',
            'what = f"windows of {window}" if window else f"its block',
            'raise ValueError(f"convert: {where} is handed {shape}, l',
            'raise ValueError(f"convert: {path} gives something else ',
            'names = [", ".join(t) or "nothing" for t in told]',
            'raise ValueError(f"convert: {path} tells its attention {',
            'raise ValueError(f"convert: {path} is {name}, which does',
            'raise ValueError(f"convert: {path} is {type(old).__name_',
            'raise ValueError(f"convert: {path} is {type(block).__nam',
        ),
        "lifeops/integrations/convert_life.py": (
            'sizes = ", ".join(f"{name} {layer.in_features} to {layer',
            'raise ValueError(f"convert: {path} must map {dim} channe',
            'raise ValueError(f"convert: {path}.{name} is over {width',
            'raise ValueError(f"convert: {path} is {type(attn).__name',
            'got = f"{layer.in_features} channels to {layer.out_featu',
            'raise ValueError(f"convert: {path}.{name} must give q, k',
            'raise ValueError(f"convert: {type(host.trunk).__name__} ',
        ),
        "lifeops/integrations/convert_localvit.py": (
            'odd = ", ".join(beyond(block.module, _PLAIN)) or "anothe',
            'raise ValueError(f"convert: {block.path} is {type(block.',
        ),
        "lifeops/integrations/convert_probe.py": (
            'raise ValueError(f"{type(embed).__name__}, the patch emb',
            "except Exception:",
            "except Exception as error:",
            "raise _failed(host.trunk, error) from error",
            'raise ValueError(f"convert: {type(host.trunk).__name__} ',
            'if str(error).startswith("lifeops:"):',
            'return ValueError(str(error).replace("lifeops:", "conver',
            'why = f"it does not run on one with its blocks passing t',
            'return ValueError(f"convert: {type(model).__name__} cann',
            'has = f"{x.shape[1]} tokens" if x.dim() == 3 else f"{tup',
            'raise ValueError(f"convert: {path} is given {has}, looke',
            'raise ValueError(f"convert: {path} is given maps {tuple(',
        ),
        "lifeops/integrations/convert_stages.py": (
            "raise",
            'raise ValueError(f"convert: the shortcut of {unit.path} ',
            'raise ValueError(f"convert: the tokens of {path} do not ',
            'found = f"{len(rows)} tokens, of which {rows_at(rows, ma',
            'raise ValueError(f"convert: {host.blocks[0].path} is giv',
        ),
        "lifeops/integrations/official.py": (
            'raise CheckpointError(f"{family.key!r} must be floating ',
        ),
        "lifeops/integrations/pass_watch.py": (
            "except (NotImplementedError, RuntimeError):  # sparse, w",
            "return _NONE",
            "except RuntimeError:",
            "self.lost = func._schema.name",
            "return",
        ),
        "lifeops/integrations/token_place.py": (
            'raise ValueError(f"{self.op}: {name} ran twice in one fo',
            "got = tuple(x.shape) if isinstance(x, Tensor) else type(",
            'raise ValueError(f"{self.op}: {name} must give tokens or',
            'raise ValueError(f"{self.op}: {path} runs before {type(s',
            'lost = f" (lost at {self.watch.lost})" if self.watch.los',
            'raise ValueError(f"{self.op}: the patches\' way from the ',
            'return f"{found}: none of the {n} patches can be followe',
        ),
    },
    "another platform, or a file of one": {
        "csrc/cpu/isa.h": (
            'if (__builtin_cpu_supports("avx2")',
        ),
        "lifeops/built.py": (
            'return f"it is cut short, {size} bytes"',
            "return None",
        ),
        "lifeops/files.py": (
            "except ImportError:  # Windows: nothing is locked, and w",
            "fcntl = None",
        ),
    },
    "only torch.compile and torch.export go there, which translate frames instead of running them: tests/"
    "test_capture.py compares what they make": {
        "lifeops/nn/grids.py": (
            "found = self._traced()",
            "thread = self._thread",
            "if thread.traced is not None:",
            "return thread.traced or None",
            "if thread.scopes:",
            "return thread.scopes[-1].grid",
            "return next(iter(self._seen)) if len(self._seen) == 1 an",
            "return",
            "self._thread.traced = None",
            "thread.traced = grid",
            "if maps is not None:",
            "self._thread.outside, self._thread.traced = (self._threa",
            "if self._thread.outside is not None:  # a checkpoint's r",
            "self._thread.outside, (self._thread.traced,) = None, sel",
        ),
        "lifeops/nn/plain.py": (
            "return not reasons(module)",
        ),
        "lifeops/ops/local_attention/function.py": (
            "spec.check(*args)",
            "y = _exported(*args)",
        ),
        "lifeops/ops/token_dwconv/public.py": (
            "residual = x.view_as(x)  # dynamo (torch 2.13) does not ",
        ),
        "lifeops/pointwise.py": (
            "return False  # a compiler chooses products itself",
        ),
        "lifeops/torchlib.py": (
            "return True",
        ),
    },
}  # fmt: skip
