// torch keeps a pool of OpenMP threads that spin for some milliseconds after each operation.
// A second pool beside it would compete with the spinning threads for the same cores. So where torch's
// OpenMP runtime has the GNU entry point (libgomp, and LLVM's libomp too), its pool is borrowed: the symbol
// is looked up in the running process, and nothing is linked, whatever name torch gave to its copy.
// Elsewhere plain threads are started.
#include "threads.h"

#include <atomic>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace fewbit {
namespace {

using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

GompParallel find_pool() {
#if defined(_WIN32)
    return nullptr;
#else
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

struct Job {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    void (*body)(void*, int64_t);
    void* context;
};

void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    for (int64_t task = job.next++; task < job.tasks; task = job.next++) job.body(job.context, task);
}

}  // namespace

void parallel_for(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
    static const GompParallel pool = find_pool();
    Job job;
    job.tasks = tasks;
    job.body = body;
    job.context = context;
    if (threads > tasks) threads = static_cast<int>(tasks);
    if (threads <= 1) {
        work(&job);
    } else if (pool) {
        pool(work, &job, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < threads; i++) others.emplace_back(work, &job);
        work(&job);
        for (std::thread& other : others) other.join();
    }
}

}  // namespace fewbit
