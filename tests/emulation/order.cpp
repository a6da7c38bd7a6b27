// Clocks of warps and copies, as in Flanagan and Freund, "FastTrack: Efficient and Precise Dynamic Race Detection",
// PLDI 2009. Steps are counted on over all clusters, so that what is noted of one before is in the past of all.
#include <ai3_emulation/order.h>
#include <ai3_emulation/runtime.h>

#include <algorithm>
#include <string>
#include <utility>

namespace ai3_emulation {

namespace {

constexpr size_t kUnit = 4;

struct Seen {
  uint32_t write = 0, writer = 0;
  std::vector<std::pair<uint32_t, uint32_t>> reads;  // by warp, since it was written
};

struct Order {
  std::vector<Clock> warps;
  std::vector<Seen> seen;        // of each unit of the cluster's shared memory
  uint32_t first = 0, last = 0;  // steps: what is not above the first was of a cluster before
  unsigned copies = 0;           // their place in a clock
};
Order& order() {
  static Order* const o = new Order();
  return *o;
}

unsigned own_warp() { return current_thread() / 32; }

}  // namespace

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

namespace {

std::string name_of(uint32_t warp) { return warp == order().copies ? "a copy" : "warp " + std::to_string(warp); }

template <typename Use>
void each_unit(size_t begin, size_t bytes, const Use& use) {
  std::vector<Seen>& seen = order().seen;
  const size_t end = (begin + bytes + kUnit - 1) / kUnit;
  if (seen.size() < end) seen.resize(end);
  for (size_t i = begin / kUnit; i < end; ++i) use(seen[i]);
}

// That a warp of this clock has seen what was done there.
void check_writes(const Seen& unit, const Clock& known, const char* verb) {
  if (unit.write > order().first && unit.write > known[unit.writer])
    fail(std::string(verb) + " shared memory that " + name_of(unit.writer) + " writes, and nothing puts them in order");
}
void check_reads(const Seen& unit, const Clock& known) {
  for (const auto& [reader, at] : unit.reads) {
    if (at > order().first && at > known[reader])
      fail("writes shared memory that " + name_of(reader) + " reads, and nothing puts them in order");
  }
}

}  // namespace

void begin_order(unsigned warps) {
  Order& o = order();
  o.copies = warps, o.first = o.last;
  o.warps.assign(warps, Clock(warps + 1, o.last));
  for (unsigned i = 0; i < warps; ++i) o.warps[i][i] = ++o.last;
}

void tell(Clock& what) {
  Order& o = order();
  join(what, o.warps[own_warp()]);
  o.warps[own_warp()][own_warp()] = ++o.last;
}

void learn(const Clock& what) { join(order().warps[own_warp()], what); }

void meet_in_order(const std::vector<unsigned>& threads) {
  Order& o = order();
  Clock all;
  for (const unsigned thread : threads) join(all, o.warps[thread / 32]);
  for (const unsigned thread : threads) {
    Clock& own = o.warps[thread / 32];
    join(own, all);
    own[thread / 32] = ++o.last;
  }
}

void check_order(size_t begin, size_t bytes, bool writes) {
  const unsigned own = own_warp();
  const Clock& known = order().warps[own];
  each_unit(begin, bytes, [&](Seen& unit) {
    check_writes(unit, known, writes ? "writes" : "reads");
    if (writes) {
      check_reads(unit, known);
      unit.write = known[own], unit.writer = own;
      unit.reads.clear();
      return;
    }
    for (auto& [reader, at] : unit.reads) {
      if (reader != own) continue;
      at = known[own];
      return;
    }
    unit.reads.emplace_back(own, known[own]);
  });
}

Clock write_by_copy(size_t begin, size_t bytes) {
  Order& o = order();
  Clock known = o.warps[own_warp()];
  const uint32_t step = ++o.last;
  each_unit(begin, bytes, [&](Seen& unit) {
    check_writes(unit, known, "copies to");
    check_reads(unit, known);
    unit.write = step, unit.writer = o.copies;
    unit.reads.clear();
  });
  known[o.copies] = step;
  return known;
}

}  // namespace ai3_emulation
