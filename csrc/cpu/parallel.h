// SPDX-License-Identifier: Apache-2.0
// Threads, shared with torch.
//
// A second thread pool would spin against torch's. This library therefore neither links an OpenMP
// runtime nor starts its own pool: it finds the runtime that is already in the process (torch's
// libgomp, whatever its file is called) and forks through that, with that runtime's thread count.
// Where there is none, it falls back to std::thread; see parallel.cpp.
#pragma once

#include <cstdint>

namespace mmq::cpu {

// Threads that a parallel_for of this process may use; follows torch.set_num_threads.
int max_threads();

// "libgomp.so.1" or the like, or "std::thread": what parallel_for forks through.
const char* threading_backend();

// Calls task(context, begin, end) over [0, count), cut at multiples of `grain`: long ranges at
// first, single runs of `grain` at the end. Which thread takes what is not fixed, and what is
// computed must not depend on it.
// The first exception of a task is rethrown here, after all threads have come back.
void parallel_run(int64_t count, int64_t grain, void (*task)(void*, int64_t, int64_t),
                  void* context);

template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  parallel_run(
      count, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

}  // namespace mmq::cpu
