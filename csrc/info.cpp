// SPDX-License-Identifier: Apache-2.0
// What is not a tensor op: how this build was made and what the machine offers. Read by `python -m lifeops info`.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

#ifndef LIFEOPS_CUDA_ARCHS
#define LIFEOPS_CUDA_ARCHS ""
#endif
#ifndef LIFEOPS_BUILT
#define LIFEOPS_BUILT ""
#endif
#ifndef LIFEOPS_SOURCES
#define LIFEOPS_SOURCES ""
#endif

namespace py = pybind11;

PYBIND11_MODULE(_info, m) {
  m.doc() = "Facts about the compiled kernels.";
  m.def("isa", [] { return lifeops::isa_name(lifeops::supported_isa()); }, "The instruction set the CPU kernels use here.");
  m.def("build", [] {
    py::dict facts;
    facts["backends"] = LIFEOPS_BUILT;
    facts["cuda_archs"] = LIFEOPS_CUDA_ARCHS;
    facts["sources"] = LIFEOPS_SOURCES;
    facts["compiler"] = __VERSION__;
    facts["baseline"] = lifeops::baseline_vectors();
    return facts;
  }, "How the extension was built: backends, CUDA archs, digest of csrc, compiler, vectors of the baseline kernels.");
}
