// A grid of CUDA threads on one thread of the host: each is a fiber that runs until it has to wait, then another one is drawn.
//
// The schedule is greedy and random: a block goes on until all its threads wait, which thread runs next depends on the seed, and some
// threads are held back as long as others can run. So what a missing barrier lets a thread see, some seed shows. Shared memory is NaN when a block starts. What can never happen on a
// GPU without a fault of the kernel ends the launch with a message: threads that wait for ever (and for what), a barrier that some
// thread of a block does not reach, an address outside a block's shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace sim {

constexpr int warp_size = 32;

struct Dim {
  unsigned x = 1, y = 1, z = 1;

  unsigned count() const { return x * y * z; }
};

// The line of the kernel that called a primitive: the default argument of each of them.
struct Where {
  const char* file;
  int line;

  static Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct LaunchConfig {
  Dim grid, block, cluster;
  size_t shared_bytes = 0;
  bool cooperative = false;
};

// Runs `kernel` once for each thread of the grid. False if something went wrong; last_error() says what.
bool launch(const LaunchConfig& config, const std::function<void()>& kernel);
const std::string& last_error();
// The cudaError_t that the next launch is to return instead of running; asking for it takes it.
int planned_failure();

// Of all launches from now on.
void set_seed(uint64_t seed);

// What follows is for kernels, and concerns the thread that calls it.

struct Position {
  Dim thread, block, block_size, grid_size, cluster_size;
  unsigned lane;          // of the warp
  unsigned cluster_rank;  // of the block in its cluster
};
const Position& position();

[[noreturn]] void fail(const std::string& message);

// The block's dynamic shared memory.
void* shared_memory();
// The same place in the shared memory of another block of the cluster.
void* map_shared(const void* address, unsigned rank);

void block_barrier(Where where);
void named_barrier(int index, unsigned threads, Where where);
void cluster_arrive(Where where);
void cluster_wait(Where where);
void grid_barrier(Where where);

// Lanes of a warp meet: all lanes of `mask`, which must name the same operation. The last one to come calls `apply` with what each
// lane brought, null for lanes outside the mask.
struct WarpData {
  void* lanes[warp_size];
};
void warp_meet(unsigned mask, const char* operation, void* mine, void (*apply)(const WarpData&), Where where);

// A look at memory that another thread is about to change. The thread lets others run first; what it does elsewhere is progress.
void poll(const char* what, Where where);
void progress();

// The thread's clock, which a look at it sets forward by a second.
uint64_t nanoseconds();

// mbarriers: eight bytes of shared memory each. The addresses are of this block's shared memory, or mapped.
void mbarrier_init(void* barrier, unsigned arrivals);
void mbarrier_arrive(void* barrier, unsigned expected_bytes, Where where);  // expects the bytes, then arrives
void mbarrier_expect(void* barrier, unsigned bytes, Where where);
bool mbarrier_test(void* barrier, unsigned parity, Where where);
void mbarrier_wait(void* barrier, unsigned parity, Where where);

// Writes to shared memory of the cluster some time later, and then credits the mbarrier, which lies in the same block, with the bytes.
void store_async(void* destination, const void* value, size_t bytes, void* barrier, Where where);

}  // namespace sim
