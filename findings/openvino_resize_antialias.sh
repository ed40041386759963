#!/usr/bin/env bash
# OpenVINO 2026.4.1, CPU, reading ONNX: Resize with mode "cubic" and antialias 1 is computed without the antialias filter.
#
# Expected: the operator as specified, or an error for an attribute that is not supported. Seen: scaling down, the result is that of
# antialias 0 to the last bit, 0.3 away from what onnxruntime computes (scaling up they agree: there the filter does nothing). No warning.
# This is how position embeddings of Vision Transformers are resized to a smaller image, so that an exported model with dynamic image
# sizes is right at training size and slightly off below it.
#
# Output seen:
#   4x4 to 3x3: OpenVINO with antialias - without: 0, OpenVINO - onnxruntime: 0.329
#   4x4 to 6x8: OpenVINO with antialias - without: 0, OpenVINO - onnxruntime: 5.96e-07
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 "numpy<3"
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper

print("openvino", openvino.__version__.split("-")[0], "onnxruntime", onnxruntime.__version__)
x = np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32)


def model(size, antialias):
    options = {"mode": "cubic", "cubic_coeff_a": -0.5, "antialias": antialias, "coordinate_transformation_mode": "half_pixel"}
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], **options)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", x.shape), ("y", (1, 2, *size)))]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 2, *size])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), "m.onnx")
    theirs = openvino.Core().compile_model("m.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    return theirs, onnxruntime.InferenceSession("m.onnx").run(None, {"x": x})[0]


found = {}
for size in ((3, 3), (6, 8)):
    (ov, ort), (plain, _) = model(size, 1), model(size, 0)
    found[size] = abs(ov - plain).max(), abs(ov - ort).max()
    print(f"4x4 to {size[0]}x{size[1]}: OpenVINO with antialias - without: {found[size][0]:.3g}, OpenVINO - onnxruntime: {found[size][1]:.3g}")
assert found[3, 3][0] == 0 and found[3, 3][1] > 0.1 and found[6, 8][1] < 1e-5
PY
