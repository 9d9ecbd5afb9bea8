#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fiber.h"
#include "library.h"

#ifndef SIM_UCONTEXT
asm(R"(
    .text
    .globl sim_switch_stack
    .hidden sim_switch_stack
    .type sim_switch_stack, @function
sim_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size sim_switch_stack, . - sim_switch_stack
)");
#endif

namespace sim {
namespace {

// The limits of sm_90.
constexpr unsigned most_threads = 1024, most_cluster_blocks = 16;
constexpr size_t most_shared = 227 << 10;

constexpr size_t shared_alignment = 128, guard_bytes = 128;
constexpr unsigned char poison = 0xff;  // NaN in every dtype
constexpr int most_steps_behind = 1 << 16;
constexpr int most_idle_rounds = 200;   // in which all threads that are left only poll
constexpr int64_t most_pending_bytes = (1 << 20) - 1;

std::string text(const Dim& d) { return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")"; }

std::string text(const Where& where) {
  const char* slash = std::strrchr(where.file, '/');
  return std::string(slash ? slash + 1 : where.file) + ":" + std::to_string(where.line);
}

bool same(const Where& a, const Where& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

Dim split(unsigned index, const Dim& size) { return {index % size.x, index / size.x % size.y, index / size.x / size.y}; }

class Random {
 public:
  void seed(uint64_t seed) { state_ = (seed + 1) * 0x9e3779b97f4a7c15; }
  unsigned below(unsigned bound) {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return static_cast<unsigned>((state_ * 0x2545f4914f6cdd1d) >> 33) % bound;
  }

 private:
  uint64_t state_ = 0x9e3779b97f4a7c15;
};

struct Block;

enum class State { waiting, ready, polling, ended };

struct Thread {
  Position position;
  Block* block = nullptr;
  unsigned index = 0;  // in its block
  Fiber fiber;
  State state = State::ready;
  const char* waits_for = "";
  Where where{};
  const void* object = nullptr;  // the mbarrier that it waits for
  bool cluster_arrived = false;  // and has not waited since
  uint64_t cluster_phase = 0;    // in which it arrived
  uint64_t time = 0;
};

struct Rendezvous {
  std::vector<Thread*> waiting;
  unsigned expected = 0;
};

struct WarpMeeting {
  unsigned warp, mask, here;  // `here`: the lanes that wait
  const char* operation;
  Where where;
  WarpData data;
  std::vector<Thread*> waiting;
};

struct Mbarrier {
  unsigned arrivals, pending;
  int64_t bytes = 0;  // expected and not yet written, or below zero: written and not yet expected
  uint64_t phase = 0;
  std::vector<Thread*> waiting;
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned alive = 0, arrived = 0;
  uint64_t phase = 0;
  std::vector<Thread*> waiting;
};

// Which threads of a block can run.
class ReadySet {
 public:
  unsigned count() const { return count_; }
  void add(unsigned i) { words_[i / 64] |= uint64_t{1} << i % 64, ++count_; }
  void remove(unsigned i) { words_[i / 64] &= ~(uint64_t{1} << i % 64), --count_; }

  // The first at `start` or after it, or else the first of all.
  unsigned next(unsigned start) const {
    uint64_t word = words_[start / 64] & (~uint64_t{0} << start % 64);
    for (unsigned w = start / 64;;) {
      if (word) return 64 * w + static_cast<unsigned>(__builtin_ctzll(word));
      w = (w + 1) % words;
      word = words_[w];
    }
  }
  unsigned last() const {
    unsigned w = words - 1;
    while (!words_[w]) --w;
    return 64 * w + 63 - static_cast<unsigned>(__builtin_clzll(words_[w]));
  }

 private:
  static constexpr unsigned words = most_threads / 64;
  uint64_t words_[words] = {};
  unsigned count_ = 0;
};

struct Block {
  Dim index;
  Cluster* cluster = nullptr;
  std::vector<std::unique_ptr<Thread>> threads;
  ReadySet ready;
  std::vector<Thread*> polling;
  unsigned started = 0, ended = 0;
  std::map<int, Rendezvous> barriers;
  std::vector<WarpMeeting> meetings;  // of all warps, those that are under way
  char* shared = nullptr;             // with a guard behind it

  bool holds(const void* address, size_t bytes, size_t size) const {
    const char* begin = static_cast<const char*>(address);
    return begin >= shared && begin + bytes <= shared + size;
  }
  bool over() const { return ended == threads.size(); }

  std::unordered_map<const void*, Mbarrier> mbarriers;
};

struct Write {
  Block* block;
  void* destination;
  char value[16];
  size_t bytes;
  void* barrier;
};

Random random_;
StackPool stacks;
std::mutex one_launch;
std::string error_;
int launches = 0, next_failure = 0;
Thread* current = nullptr;
class Launch;
Launch* running = nullptr;

std::string text(const Thread& t) { return "thread " + text(t.position.thread) + " of block " + text(t.position.block); }

void thread_main();

class Launch {
 public:
  Launch(const LaunchConfig& config, const std::function<void()>& kernel) : config_(config), kernel_(kernel) {
    order_ = static_cast<Order>(random_.below(3));
    stays_ = random_.below(4) > 0;
    has_laggards_ = random_.below(2) > 0;
    delivery_ = static_cast<Delivery>(random_.below(3));
    resident_clusters_ = 1 + random_.below(4);
  }

  void run() {
    check_config();
    std::vector<unsigned> clusters(error_.empty() ? cluster_count() : 0);
    for (unsigned i = 0; i < clusters.size(); ++i) std::swap(clusters[i] = i, clusters[random_.below(i + 1)]);
    while (error_.empty() && (!clusters.empty() || !blocks_.empty())) {
      while (!clusters.empty() && (config_.cooperative || clusters_.size() < resident_clusters_)) {
        admit(clusters.back());
        clusters.pop_back();
      }
      step();
    }
    for (auto& block : blocks_) free_block(*block);
  }

  void thread_body() {
    kernel_();
    end_thread();
  }

  // The thread at hand lets go until someone wakes it.
  void wait(const char* what, const Where& where, const void* object = nullptr) {
    idle_rounds_ = 0;
    leave(State::waiting, what, where, object);
  }

  void wake(std::vector<Thread*>& threads) {
    for (Thread* t : threads) make_ready(*t);
    threads.clear();
  }

  void poll(const char* what, const Where& where) {
    if (random_.below(4) == 0) return;
    current->block->polling.push_back(current);
    leave(State::polling, what, where, nullptr);
  }

  void progress() { idle_rounds_ = 0; }

  void meet(Rendezvous& rendezvous, unsigned expected, const char* what, const Where& where) {
    if (rendezvous.waiting.empty()) rendezvous.expected = expected;
    if (rendezvous.expected != expected) fail(std::string(what) + ": for " + std::to_string(expected) + " threads at " + text(where) +
                                              ", for " + std::to_string(rendezvous.expected) + " elsewhere");
    if (!rendezvous.waiting.empty() && !same(rendezvous.waiting[0]->where, where))
      fail(std::string(what) + ": " + text(*current) + " waits at " + text(where) + ", " + text(*rendezvous.waiting[0]) + " at " +
           text(rendezvous.waiting[0]->where));
    if (rendezvous.waiting.size() + 1 == expected) return wake(rendezvous.waiting);
    rendezvous.waiting.push_back(current);
    wait(what, where);
  }

  void grid_barrier(const Where& where) {
    if (!config_.cooperative) fail("grid barrier: the launch is not cooperative");
    if (ended_) fail("grid barrier: reached by " + text(*current) + " at " + text(where) + ", but another thread has ended");
    meet(grid_, config_.grid.count() * config_.block.count(), "grid barrier", where);
  }

  [[noreturn]] void leave_forever() {
    current->fiber.switch_to(host_, true);
    __builtin_unreachable();
  }

  void cluster_complete(Cluster& cluster) {
    if (cluster.arrived == 0 || cluster.arrived < cluster.alive) return;
    cluster.arrived = 0;
    ++cluster.phase;
    wake(cluster.waiting);
  }

  void write_later(const Write& write) { writes_.push_back(write); }

  size_t shared_bytes() const { return config_.shared_bytes; }

 private:
  enum class Order { random, first, last };
  enum class Delivery { late, random, early };

  unsigned cluster_count() const { return config_.grid.count() / config_.cluster.count(); }

  void check_config() {
    const LaunchConfig& c = config_;
    const unsigned cluster = c.cluster.count();
    const bool divides = cluster && c.grid.x % c.cluster.x == 0 && c.grid.y % c.cluster.y == 0 && c.grid.z % c.cluster.z == 0;
    if (!c.grid.count() || c.grid.y > 65535 || c.grid.z > 65535) error_ = "launch: invalid grid " + text(c.grid);
    if (!c.block.count() || c.block.count() > most_threads || c.block.z > 64) error_ = "launch: invalid block " + text(c.block);
    if (!divides || cluster > most_cluster_blocks) error_ = "launch: invalid cluster " + text(c.cluster) + " of grid " + text(c.grid);
    if (c.shared_bytes > most_shared) error_ = "launch: " + std::to_string(c.shared_bytes) + " bytes of shared memory";
  }

  // Makes the blocks of a cluster, which are on the chip together.
  void admit(unsigned index) {
    const Dim shape = config_.cluster, clusters{config_.grid.x / shape.x, config_.grid.y / shape.y, config_.grid.z / shape.z};
    const Dim place = split(index, clusters);
    clusters_.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *clusters_.back();
    cluster.alive = shape.count() * config_.block.count();
    for (unsigned rank = 0; rank < shape.count(); ++rank) {
      const Dim in = split(rank, shape);
      blocks_.push_back(std::make_unique<Block>());
      Block& block = *blocks_.back();
      block.index = {place.x * shape.x + in.x, place.y * shape.y + in.y, place.z * shape.z + in.z};
      block.cluster = &cluster;
      cluster.blocks.push_back(&block);
      make_shared_memory(block);
      make_threads(block, rank);
    }
    if (!laggards_.block) choose_laggards();
  }

  void make_shared_memory(Block& block) {
    const size_t bytes = config_.shared_bytes + guard_bytes;
    block.shared = static_cast<char*>(std::aligned_alloc(shared_alignment, (bytes + shared_alignment - 1) / shared_alignment * shared_alignment));
    std::memset(block.shared, poison, bytes);
    ASAN_POISON_MEMORY_REGION(block.shared + config_.shared_bytes, guard_bytes);
  }

  void make_threads(Block& block, unsigned rank) {
    for (unsigned i = 0; i < config_.block.count(); ++i) {
      block.threads.push_back(std::make_unique<Thread>());
      Thread& t = *block.threads.back();
      t.position = {split(i, config_.block), block.index,      config_.block, config_.grid,
                    config_.cluster,         i % warp_size, rank};
      t.block = &block;
      t.index = i;
      block.ready.add(i);
    }
  }

  void step() {
    if (delivery_ == Delivery::early ? random_.below(2) == 0 : delivery_ == Delivery::random && random_.below(16) == 0) deliver();
    if (random_.below(64) == 0 && !blocks_.empty()) wake_pollers(*blocks_[random_.below(static_cast<unsigned>(blocks_.size()))]);
    // Of many that poll some can always run.
    if (++steps_behind_ > most_steps_behind) wake_laggards();
    Block* block = choose_block();
    if (block) return resume(*block->threads[choose_thread(*block)]);
    if (deliver() || wake_laggards()) return;
    bool polled = false;
    for (auto& b : blocks_) polled = wake_pollers(*b) || polled;
    if (!polled || ++idle_rounds_ > most_idle_rounds) error_ = "deadlock: " + who_waits();
  }

  Block* choose_block() {
    if (stays_ && stay_ && stay_->ready.count()) return stay_;
    const unsigned count = static_cast<unsigned>(blocks_.size()), start = random_.below(count);
    for (unsigned i = 0; i < count; ++i) {
      Block* block = blocks_[(start + i) % count].get();
      if (block->ready.count()) return stay_ = block;
    }
    return nullptr;
  }

  unsigned choose_thread(const Block& block) {
    switch (order_) {
      case Order::first: return block.ready.next(0);
      case Order::last: return block.ready.last();
      default: return block.ready.next(random_.below(config_.block.count()));
    }
  }

  void resume(Thread& t) {
    t.block->ready.remove(t.index);
    current = &t;
    if (!t.fiber.started()) {
      ++t.block->started;
      t.fiber.start(stacks.take(), thread_main);
    }
    host_.switch_to(t.fiber);
    current = nullptr;
    if (t.state != State::ended) return;
    stacks.give_back(t.fiber.stack());
    if (t.block->over()) end_block(*t.block);
  }

  void leave(State state, const char* what, const Where& where, const void* object) {
    Thread& t = *current;
    t.state = state;
    t.waits_for = what;
    t.where = where;
    t.object = object;
    t.fiber.switch_to(host_);
  }

  void make_ready(Thread& t) {
    t.state = State::ready;
    if (t.block == laggards_.block && t.index >= laggards_.begin && t.index < laggards_.end)
      late_.push_back(&t);
    else
      t.block->ready.add(t.index);
  }

  // Some threads go on only when nobody else can: others are then as far ahead of them as they can get.
  bool wake_laggards() {
    steps_behind_ = 0;
    const bool any = !late_.empty();
    for (Thread* t : late_) t->block->ready.add(t->index);
    late_.clear();
    choose_laggards();
    return any;
  }

  void choose_laggards() {
    if (!has_laggards_) return;
    Block* block = blocks_[random_.below(static_cast<unsigned>(blocks_.size()))].get();
    const unsigned all = config_.block.count(), sizes[] = {1, warp_size, all}, size = sizes[random_.below(3)];
    const unsigned begin = random_.below(all) / size * size;
    laggards_ = {block, begin, begin + size};
  }

  bool wake_pollers(Block& block) {
    const bool any = !block.polling.empty();
    wake(block.polling);
    return any;
  }

  void end_thread() {
    Block& block = *current->block;
    Cluster& cluster = *block.cluster;
    for (auto& [index, barrier] : block.barriers)
      if (!barrier.waiting.empty() && barrier.expected == block.threads.size())
        fail(text(*current) + " ends, but " + text(*barrier.waiting[0]) + " waits for it at " + text(barrier.waiting[0]->where));
    if (!grid_.waiting.empty()) fail(text(*current) + " ends, but other threads wait for it at " + text(grid_.waiting[0]->where));
    for (const WarpMeeting& meeting : block.meetings)
      if (meeting.warp == current->index / warp_size && (meeting.mask >> current->position.lane & 1))
        fail(text(*current) + " ends, but other lanes wait for it at " + text(meeting.where));
    --cluster.alive;
    if (current->cluster_arrived && current->cluster_phase == cluster.phase) --cluster.arrived;
    cluster_complete(cluster);
    current->state = State::ended;
    ++block.ended;
    ended_ = true;
    idle_rounds_ = 0;
    leave_forever();
  }

  void end_block(Block& block) {
    char* guard = block.shared + config_.shared_bytes;
    ASAN_UNPOISON_MEMORY_REGION(guard, guard_bytes);
    if (!std::all_of(guard, guard + guard_bytes, [](char byte) { return static_cast<unsigned char>(byte) == poison; })) {
      error_ = "block " + text(block.index) + " wrote behind its shared memory";
      return;
    }
    for (const Write& write : writes_)
      if (write.block == &block) {
        error_ = "block " + text(block.index) + " ended before all asynchronous writes to its shared memory had arrived";
        return;
      }
    std::memset(block.shared, poison, config_.shared_bytes);
    Cluster* cluster = block.cluster;
    if (!std::all_of(cluster->blocks.begin(), cluster->blocks.end(), [](const Block* b) { return b->over(); })) return;
    stay_ = nullptr;
    laggards_ = {};
    for (Block* b : cluster->blocks) free_block(*b);
    const auto gone = [&](const std::unique_ptr<Block>& b) { return b->cluster == cluster; };
    blocks_.erase(std::remove_if(blocks_.begin(), blocks_.end(), gone), blocks_.end());
    const auto same_cluster = [&](const std::unique_ptr<Cluster>& c) { return c.get() == cluster; };
    clusters_.erase(std::remove_if(clusters_.begin(), clusters_.end(), same_cluster), clusters_.end());
  }

  void free_block(Block& block) {
    for (auto& t : block.threads)
      if (t->fiber.started() && t->state != State::ended) stacks.give_back(t->fiber.stack());
    ASAN_UNPOISON_MEMORY_REGION(block.shared, config_.shared_bytes + guard_bytes);
    std::free(block.shared);
  }

  // Lets one of the asynchronous writes arrive.
  bool deliver() {
    if (writes_.empty()) return false;
    std::swap(writes_[random_.below(static_cast<unsigned>(writes_.size()))], writes_.back());
    const Write write = writes_.back();
    writes_.pop_back();
    std::memcpy(write.destination, write.value, write.bytes);
    auto found = write.block->mbarriers.find(write.barrier);
    if (found == write.block->mbarriers.end()) {
      error_ = "st.async: the mbarrier of block " + text(write.block->index) + " is not initialised";
      return true;
    }
    found->second.bytes -= static_cast<int64_t>(write.bytes);
    complete(found->second);
    return true;
  }

 public:
  // Begins the next phase of a barrier if this one is complete.
  void complete(Mbarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    wake(barrier.waiting);
  }

 private:
  std::string who_waits() const {
    std::string out;
    for (const auto& block : blocks_) {
      std::map<std::string, std::vector<const Thread*>> groups;
      for (const auto& t : block->threads)
        if (t->state != State::ended) groups[what_is_awaited(*t)].push_back(t.get());
      for (const auto& [what, threads] : groups)
        out += (out.empty() ? "" : "; ") + std::to_string(threads.size()) + " threads of block " + text(block->index) + " (first " +
               text(threads[0]->position.thread) + ") wait for " + what;
    }
    return out;
  }

  std::string what_is_awaited(const Thread& t) const {
    std::string out = std::string(t.waits_for) + " at " + text(t.where);
    const auto found = t.block->mbarriers.find(t.object);
    if (found == t.block->mbarriers.end()) return out;
    return out + ", phase " + std::to_string(found->second.phase) + ", " + std::to_string(found->second.pending) + " arrivals and " +
           std::to_string(found->second.bytes) + " bytes missing";
  }

  const LaunchConfig config_;
  const std::function<void()>& kernel_;
  Order order_;
  bool stays_;  // with a block while it has threads that can run
  Delivery delivery_;
  unsigned resident_clusters_;
  Fiber host_;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<std::unique_ptr<Block>> blocks_;
  Block* stay_ = nullptr;
  struct {
    Block* block;
    unsigned begin, end;  // of its threads
  } laggards_{};
  std::vector<Thread*> late_;
  int steps_behind_ = 0;  // of all others, since laggards went on
  bool has_laggards_;
  Rendezvous grid_;
  bool ended_ = false;  // any thread
  int idle_rounds_ = 0;
  std::vector<Write> writes_;
};

void thread_main() {
  current->fiber.arrived();
  running->thread_body();
}

// The block of this cluster in whose shared memory the bytes lie, and which must be able to take them.
Block& block_of(const void* address, size_t bytes, const char* operation, const Where& where) {
  const auto refuse = [&](const std::string& why) { fail(std::string(operation) + " at " + text(where) + ": " + why); };
  for (Block* block : current->block->cluster->blocks) {
    if (!block->holds(address, bytes, running->shared_bytes())) continue;
    if (block->started == 0) refuse("block " + text(block->index) + " has not started; a cluster barrier must come first");
    if (block->over()) refuse("block " + text(block->index) + " has ended");
    return *block;
  }
  refuse("the address is outside the shared memory of the cluster");
  __builtin_unreachable();
}

// Reads of a barrier's memory by the kernel show nothing, but that it was overwritten must.
void mark(void* barrier) {
  const uintptr_t word = ~reinterpret_cast<uintptr_t>(barrier);
  std::memcpy(barrier, &word, sizeof word);
}

Mbarrier& find_mbarrier(void* barrier, const char* operation, const Where& where) {
  const auto refuse = [&](const std::string& why) { fail(std::string(operation) + " at " + text(where) + ": " + why); };
  Block& block = block_of(barrier, 8, operation, where);
  const auto found = block.mbarriers.find(barrier);
  if (found == block.mbarriers.end()) refuse("the mbarrier of block " + text(block.index) + " is not initialised");
  uintptr_t word;
  std::memcpy(&word, barrier, sizeof word);
  if (word != ~reinterpret_cast<uintptr_t>(barrier)) refuse("the memory of the mbarrier was overwritten");
  return found->second;
}

}  // namespace

bool launch(const LaunchConfig& config, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  error_.clear();
  ++launches;
  Launch launch(config, kernel);
  running = &launch;
  launch.run();
  running = nullptr;
  return error_.empty();
}

const std::string& last_error() { return error_; }
int planned_failure() { return std::exchange(next_failure, 0); }
void set_seed(uint64_t seed) { random_.seed(seed); }
const Position& position() { return current->position; }

void fail(const std::string& message) {
  if (error_.empty()) error_ = message;
  running->leave_forever();
}

void* shared_memory() { return current->block->shared; }

void* map_shared(const void* address, unsigned rank) {
  const Block& block = *current->block;
  if (!block.holds(address, 1, running->shared_bytes())) fail("map to a block of the cluster: not an address of this block's shared memory");
  if (rank >= block.cluster->blocks.size()) fail("map to a block of the cluster: it has no rank " + std::to_string(rank));
  return block.cluster->blocks[rank]->shared + (static_cast<const char*>(address) - block.shared);
}

void block_barrier(Where where) {
  Block& block = *current->block;
  if (block.ended) fail("block barrier: reached by " + text(*current) + " at " + text(where) + ", but another thread of the block has ended");
  running->meet(block.barriers[0], static_cast<unsigned>(block.threads.size()), "block barrier", where);
}

void named_barrier(int index, unsigned threads, Where where) {
  if (index < 0 || index > 15 || threads % warp_size) fail("named barrier: 0 to 15, and a multiple of 32 threads");
  running->meet(current->block->barriers[index], threads, "named barrier", where);
}

void cluster_arrive(Where where) {
  Cluster& cluster = *current->block->cluster;
  if (current->cluster_arrived) fail("cluster barrier: " + text(*current) + " arrives twice, at " + text(where));
  current->cluster_arrived = true;
  current->cluster_phase = cluster.phase;
  ++cluster.arrived;
  running->cluster_complete(cluster);
}

void cluster_wait(Where where) {
  Cluster& cluster = *current->block->cluster;
  if (!current->cluster_arrived) fail("cluster barrier: " + text(*current) + " waits without having arrived, at " + text(where));
  if (cluster.phase == current->cluster_phase) {
    cluster.waiting.push_back(current);
    running->wait("cluster barrier", where);
  }
  current->cluster_arrived = false;
}

void grid_barrier(Where where) { running->grid_barrier(where); }

void warp_meet(unsigned mask, const char* operation, void* mine, void (*apply)(const WarpData&), Where where) {
  Block& block = *current->block;
  const unsigned warp = current->index / warp_size, lane = current->position.lane, bit = 1u << lane;
  const unsigned lanes = std::min<unsigned>(warp_size, static_cast<unsigned>(block.threads.size()) - warp * warp_size);
  const auto refuse = [&](const std::string& why) { fail(std::string(operation) + " at " + text(where) + ": " + why); };
  if (!(mask & bit)) refuse("lane " + std::to_string(lane) + " is not in its own mask");
  if (lanes < warp_size && mask >> lanes) refuse("the mask names lanes that the block does not have");
  for (unsigned i = warp * warp_size; i < warp * warp_size + lanes; ++i)
    if ((mask >> i % warp_size & 1) && block.threads[i]->state == State::ended) refuse("the mask names a lane that has ended");

  auto meeting = std::find_if(block.meetings.begin(), block.meetings.end(),
                              [&](const WarpMeeting& m) { return m.warp == warp && (m.mask & mask); });
  if (meeting == block.meetings.end()) {
    block.meetings.push_back({warp, mask, 0, operation, where, {}, {}});
    meeting = block.meetings.end() - 1;
  }
  if (meeting->mask != mask || !same(meeting->where, where) || std::strcmp(meeting->operation, operation))
    refuse(std::string("other lanes of the warp wait for ") + meeting->operation + " at " + text(meeting->where));
  meeting->here |= bit;
  meeting->data.lanes[lane] = mine;
  if (meeting->here != mask) {
    meeting->waiting.push_back(current);
    return running->wait(operation, where);
  }
  WarpMeeting complete = std::move(*meeting);
  block.meetings.erase(meeting);
  apply(complete.data);
  running->wake(complete.waiting);
}

void poll(const char* what, Where where) { running->poll(what, where); }
void progress() { running->progress(); }
uint64_t nanoseconds() { return current->time += 1000000000; }

void mbarrier_init(void* barrier, unsigned arrivals) {
  if (!current->block->holds(barrier, 8, running->shared_bytes()) || reinterpret_cast<uintptr_t>(barrier) % 8)
    fail("mbarrier init: the address must be a multiple of 8 in this block's shared memory");
  if (arrivals == 0 || arrivals > most_pending_bytes) fail("mbarrier init: " + std::to_string(arrivals) + " arrivals");
  current->block->mbarriers[barrier] = {arrivals, arrivals, 0, 0, {}};
  mark(barrier);
}

void mbarrier_expect(void* barrier, unsigned bytes, Where where) {
  Mbarrier& found = find_mbarrier(barrier, "mbarrier expect", where);
  found.bytes += bytes;
  if (found.bytes > most_pending_bytes) fail("mbarrier expect at " + text(where) + ": more than 2^20 - 1 bytes are pending");
}

void mbarrier_arrive(void* barrier, unsigned expected_bytes, Where where) {
  if (expected_bytes) mbarrier_expect(barrier, expected_bytes, where);
  Mbarrier& found = find_mbarrier(barrier, "mbarrier arrive", where);
  if (found.pending == 0) fail("mbarrier arrive at " + text(where) + ": all arrivals of this phase were there already");
  --found.pending;
  running->progress();
  running->complete(found);
}

bool mbarrier_test(void* barrier, unsigned parity, Where where) {
  Mbarrier& found = find_mbarrier(barrier, "mbarrier test", where);
  if (found.phase % 2 != parity) return true;
  running->poll("mbarrier", where);
  return found.phase % 2 != parity;
}

void mbarrier_wait(void* barrier, unsigned parity, Where where) {
  Mbarrier& found = find_mbarrier(barrier, "mbarrier wait", where);
  while (found.phase % 2 == parity) {
    found.waiting.push_back(current);
    running->wait("mbarrier", where, barrier);
  }
}

void store_async(void* destination, const void* value, size_t bytes, void* barrier, Where where) {
  Block& block = block_of(destination, bytes, "st.async", where);
  const auto refuse = [&](const std::string& why) { fail("st.async at " + text(where) + ": " + why); };
  if (&block != &block_of(barrier, 8, "st.async", where)) refuse("data and mbarrier must lie in the same block");
  if (reinterpret_cast<uintptr_t>(destination) % bytes) refuse("the destination is not aligned");
  Write write{&block, destination, {}, bytes, barrier};
  std::memcpy(write.value, value, bytes);
  running->write_later(write);
  running->progress();
}

}  // namespace sim

SIM_EXPORT void sim_set_seed(uint64_t seed) { sim::set_seed(seed); }
SIM_EXPORT void sim_fail_launch(int status) { sim::next_failure = status; }
SIM_EXPORT void sim_release_stacks() {
  const std::lock_guard<std::mutex> lock(sim::one_launch);
  sim::stacks.release();
}
SIM_EXPORT int sim_launches() { return sim::launches; }
SIM_EXPORT const char* sim_last_error() { return sim::last_error().c_str(); }
