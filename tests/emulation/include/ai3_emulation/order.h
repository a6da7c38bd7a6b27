// What has happened before what in a cluster, for the model of sm_90a, whose threads wait for each other in pairs: of
// two accesses to shared memory, one of them writing, that no wait puts in order, one is too early on some GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ai3_emulation {

// Of each warp, and of copies behind them, up to which of its steps is known.
using Clock = std::vector<uint32_t>;

void begin_order(unsigned warps);  // of a cluster
void join(Clock& into, const Clock& from);
// Of the warp that runs: tells what it has done, and learns what others have.
void tell(Clock& what);
void learn(const Clock& what);
// Threads that have waited for each other: their warps have seen what any of them had done.
void meet_in_order(const std::vector<unsigned>& threads);
// An access of the warp that runs, which fails where none of the waits puts it behind another's.
void check_order(size_t begin, size_t bytes, bool writes);
// The write of a copy that the warp that runs asks for, and what is known when it has landed.
Clock write_by_copy(size_t begin, size_t bytes);

}  // namespace ai3_emulation
