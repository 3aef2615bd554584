// Independent tasks on several threads.
#pragma once

#include <cstdint>

namespace fewbit {

// Calls body(context, task) for every task in 0 … tasks − 1, on up to `threads` threads, in any order.
void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

// The same for a callable. It must not throw.
template <class Body>
void parallel_for(int64_t tasks, int threads, Body&& body) {
    parallel_for(
        tasks, threads, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

}  // namespace fewbit
