// Runs a pass for the cell that its parameters name.
#pragma once

#include "common/params.h"
#include "cpu/threads.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

// Calls visit(Pass<T, cell>(params, ...)) for the cell of the parameters.
template <template <class, CellKind> class Pass, class T, class Params, class Visit>
void with_cell(const Params& params, const Threads& threads, void* workspace, Visit visit) {
  if (params.sizes.cell == CellKind::lstm) {
    Pass<T, CellKind::lstm> pass(params, threads, workspace);
    visit(pass);
  } else {
    Pass<T, CellKind::gru> pass(params, threads, workspace);
    visit(pass);
  }
}

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
