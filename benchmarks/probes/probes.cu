// Prints what the latencies of this GPU are that decide how a recurrence should run on it, as JSON. For nvcc -arch=sm_90a -std=c++17 -I csrc;
// ../gpu_probes.py compiles and runs it.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "kernels.cuh"

namespace {

using namespace probes;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "gpu_probes: %s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}
#define CHECK(call) check(call, #call)

// Elements of device memory, all bytes the same at first.
template <class T>
class DeviceArray {
 public:
  DeviceArray(size_t count, int byte) : count_(count), byte_(byte) {
    CHECK(cudaMalloc(&data_, count * sizeof(T)));
    reset();
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  void reset() { CHECK(cudaMemset(data_, byte_, count_ * sizeof(T))); }
  T* data() const { return data_; }
  std::vector<T> read() const {
    std::vector<T> found(count_);
    CHECK(cudaMemcpy(found.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return found;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
  int byte_;
};

// The median of five runs, in microseconds, after one that warms up. `prepare` is not timed.
double median_microseconds(const std::function<void()>& prepare, const std::function<void(cudaStream_t)>& run) {
  constexpr int runs = 5;
  cudaStream_t stream;
  cudaEvent_t begin, end;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i <= runs; ++i) {
    prepare();
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaEventRecord(begin, stream));
    run(stream);
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float milliseconds;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i > 0) times.push_back(1e3 * milliseconds);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  CHECK(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[runs / 2];
}

long long sum(const std::vector<int>& values) { return std::accumulate(values.begin(), values.end(), 0ll); }

// The longer of two runs of a kernel less the shorter, by step: what starts and ends it does not count.
double microseconds_per_step(unsigned steps, const std::function<void()>& prepare, const std::function<void(cudaStream_t, unsigned)>& run) {
  const double all = median_microseconds(prepare, [&](cudaStream_t stream) { run(stream, steps); });
  const double half = median_microseconds(prepare, [&](cudaStream_t stream) { run(stream, steps / 2); });
  return (all - half) / (steps - steps / 2);
}

// A JSON array of objects, one a line.
class Rows {
 public:
  explicit Rows(const char* name) { std::printf("%s\"%s\": [", first_list_ ? "" : ",\n", name), first_list_ = false; }
  ~Rows() { std::printf("]"); }
  template <class... Values>
  void add(const char* format, Values... values) {
    std::printf("%s\n  ", first_ ? "" : ",");
    std::printf(format, values...);
    std::fflush(stdout);
    first_ = false;
  }

 private:
  static bool first_list_;
  bool first_ = true;
};
bool Rows::first_list_ = true;

template <class... Arguments>
void allow_shared(void (*kernel)(Arguments...), size_t bytes) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

void probe_cluster_exchange() {
  Rows rows("cluster_exchange");
  constexpr unsigned steps = 2000;
  for (unsigned ranks : {2u, 4u, 8u, 16u})
    for (unsigned kilobytes : {1u, 2u, 4u, 8u, 16u, 32u}) {
      const unsigned chunks = kilobytes * 1024 / sizeof(Words4);
      LaunchShape shape{ranks};
      shape.threads = threads;
      shape.shared_bytes = 2 * chunks * sizeof(Words4) + 2 * sizeof(Mbarrier);
      allow_shared(exchange_in_cluster, shape.shared_bytes);
      DeviceArray<int> errors(ranks * threads, 0);
      const double time = microseconds_per_step(steps, [] {}, [&](cudaStream_t stream, unsigned count) {
        Together together;
        together.cluster = ranks;
        CHECK(launch_together(exchange_in_cluster, shape, together, stream, chunks, count, errors.data()));
      });
      rows.add("{\"blocks\": %u, \"bytes\": %u, \"us_per_step\": %.4f, \"wrong_words\": %lld}", ranks, kilobytes * 1024, time, sum(errors.read()));
    }
}

void probe_active_clusters() {
  Rows rows("active_clusters");
  constexpr size_t shared_bytes = 200 << 10;
  allow_shared(exchange_in_cluster, shared_bytes);
  for (unsigned ranks : {1u, 2u, 4u, 8u, 16u}) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = ranks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(ranks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    CHECK(cudaOccupancyMaxActiveClusters(&clusters, exchange_in_cluster, &config));
    rows.add("{\"blocks\": %u, \"shared_bytes\": %zu, \"clusters\": %d}", ranks, shared_bytes, clusters);
  }
}

void probe_grid_gather(unsigned multiprocessors) {
  Rows rows("grid_gather");
  constexpr unsigned steps = 2000;
  for (unsigned count : {32u, 64u, 128u})
    for (unsigned kilobytes : {4u, 16u, 64u})
      for (bool fences : {false, true}) {
        if (count > multiprocessors) continue;
        const unsigned chunks = kilobytes * 1024 / sizeof(Words4);
        LaunchShape shape{count};
        shape.threads = threads;
        shape.shared_bytes = 120 << 10;  // one block for each multiprocessor
        allow_shared(gather_by_sentinel, shape.shared_bytes);
        DeviceArray<Words4> buffers(3 * chunks, 0xff);
        DeviceArray<int> errors(count * threads, 0);
        const double time = microseconds_per_step(steps, [&] { buffers.reset(); }, [&](cudaStream_t stream, unsigned times) {
          Together together;
          together.cooperative = true;
          CHECK(launch_together(gather_by_sentinel, shape, together, stream, chunks, times, fences, buffers.data(), errors.data()));
        });
        rows.add("{\"blocks\": %u, \"bytes\": %u, \"fences\": %s, \"us_per_step\": %.4f, \"wrong_words\": %lld}", count, kilobytes * 1024,
                 fences ? "true" : "false", time, sum(errors.read()));
      }
}

template <int columns>
void probe_multiply(Rows& rows, unsigned multiprocessors) {
  constexpr unsigned passes = 4000;
  LaunchShape shape{multiprocessors};
  shape.threads = threads;
  shape.shared_bytes = std::max<size_t>(b_words_per_column * columns * sizeof(uint32_t), 120 << 10);  // one block for each multiprocessor
  allow_shared(multiply_from_registers<columns>, shape.shared_bytes);
  DeviceArray<int> errors(multiprocessors * threads, 0);
  const double time = microseconds_per_step(passes, [] {}, [&](cudaStream_t stream, unsigned count) {
    CHECK(launch(multiply_from_registers<columns>, shape, stream, count, errors.data()));
  });
  const double operations = 2.0 * 16 * multiply_depth * columns * (threads / 32) * multiprocessors;
  rows.add("{\"columns\": %d, \"us_per_pass\": %.4f, \"tflops\": %.1f, \"wrong_sums\": %lld}", columns, time, operations / time * 1e-6,
           sum(errors.read()));
}

void probe_multiply(unsigned multiprocessors) {
  Rows rows("multiply_from_registers");
  probe_multiply<8>(rows, multiprocessors);
  probe_multiply<16>(rows, multiprocessors);
  probe_multiply<32>(rows, multiprocessors);
  probe_multiply<64>(rows, multiprocessors);
}

void probe_launch_gap() {
  Rows rows("launch_gap");
  constexpr unsigned links = 200;
  for (unsigned blocks : {1u, 64u})
    for (bool overlaps : {false, true}) {
      DeviceArray<int> values(blocks * threads, 0);
      LaunchShape shape{blocks};
      shape.threads = threads;
      Together together;
      together.overlaps = overlaps;
      cudaStream_t capturing;
      cudaGraph_t graph;
      cudaGraphExec_t chain;
      CHECK(cudaStreamCreate(&capturing));
      CHECK(cudaStreamBeginCapture(capturing, cudaStreamCaptureModeThreadLocal));
      for (unsigned k = 0; k < links; ++k) CHECK(launch_together(link, shape, together, capturing, k, values.data()));
      CHECK(cudaStreamEndCapture(capturing, &graph));
      CHECK(cudaGraphInstantiate(&chain, graph, 0));
      const double time = median_microseconds([&] { values.reset(); }, [&](cudaStream_t stream) { CHECK(cudaGraphLaunch(chain, stream)); });
      const std::vector<int> found = values.read();
      const auto wrong = std::count_if(found.begin(), found.end(), [](int value) { return value != links; });
      rows.add("{\"blocks\": %u, \"overlaps\": %s, \"us_per_kernel\": %.4f, \"wrong_values\": %lld}", blocks, overlaps ? "true" : "false",
               time / links, static_cast<long long>(wrong));
      CHECK(cudaGraphExecDestroy(chain));
      CHECK(cudaGraphDestroy(graph));
      CHECK(cudaStreamDestroy(capturing));
    }
}

}  // namespace

int main() {
  cudaDeviceProp device;
  int driver, runtime;
  CHECK(cudaGetDeviceProperties(&device, 0));
  CHECK(cudaDriverGetVersion(&driver));
  CHECK(cudaRuntimeGetVersion(&runtime));
  if (device.major != 9) {
    std::fprintf(stderr, "gpu_probes: a GPU of compute capability 9.0 is wanted, %s has %d.%d\n", device.name, device.major, device.minor);
    return 1;
  }
  std::printf("{\"device\": \"%s\", \"multiprocessors\": %d, \"driver\": %d, \"runtime\": %d,\n", device.name, device.multiProcessorCount, driver,
              runtime);
  const unsigned multiprocessors = static_cast<unsigned>(device.multiProcessorCount);
  probe_active_clusters();
  probe_launch_gap();
  probe_multiply(multiprocessors);
  probe_cluster_exchange();
  probe_grid_gather(multiprocessors);
  std::printf("}\n");
  return 0;
}
