// The scheduler for Python's ctypes: plans, and hands out what the kernels would get.
#include "cpu/plan.h"

using hsm::cpu::Plan;

extern "C" {

struct Mask {
  const bool* data;
  int64_t step_stride, batch_stride;
};

Plan* make_plan(int64_t steps, int64_t batch, const Mask* reset, const Mask* detach, const int64_t* lengths, bool backward) {
  hsm::Sizes sizes{};
  sizes.steps = steps;
  sizes.batch = batch;
  hsm::Boundaries boundaries{};
  if (reset) {
    boundaries.reset_mask = reset->data;
    boundaries.reset_step_stride = reset->step_stride;
    boundaries.reset_batch_stride = reset->batch_stride;
  }
  if (detach) {
    boundaries.detach_mask = detach->data;
    boundaries.detach_step_stride = detach->step_stride;
    boundaries.detach_batch_stride = detach->batch_stride;
  }
  boundaries.lengths = lengths;
  return new Plan(sizes, boundaries, backward);
}

void read_plan(const Plan* plan, hsm::Schedule* schedule) { *schedule = plan->schedule(); }

void free_plan(const Plan* plan) { delete plan; }

int64_t choose_slots(int64_t segments, int64_t sequences) { return hsm::cpu::choose_slots(segments, sequences); }
}
