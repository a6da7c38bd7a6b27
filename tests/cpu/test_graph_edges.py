"""ai3/graph_edges.h without a GPU: which edges of a captured graph change, with a driver that keeps them in a list."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest

from ai3_compile.backends import builder

pytestmark = pytest.mark.skipif(builder.no_compiler_reason() is not None, reason=str(builder.no_compiler_reason()))

# The four functions of the driver, over edges in a list; the call that `calls_until_failure` counts down to fails.
DRIVER = r"""
#include <ai3/graph_edges.h>

using ai3::cuda::GraphEdge;
struct Edge { void *from, *to; GraphEdge data; };
extern "C" {
std::vector<Edge> edges;
std::vector<void*> last;  // what the next launch depends on
int capturing = 1, calls_until_failure = -1;

static int failure() { return calls_until_failure >= 0 && calls_until_failure-- == 0 ? 700 : 0; }
int cuStreamGetCaptureInfo_v3(void*, int* status, uint64_t*, void** graph, void* const** before, const GraphEdge**,
                              size_t* count) {
  *status = capturing, *graph = &edges, *before = last.data(), *count = last.size();
  return failure();
}
int cuGraphNodeGetDependentNodes_v2(void* node, void** behind, GraphEdge* data, size_t* count) {
  size_t found = 0;
  for (const Edge& e : edges) {
    if (e.from != node) continue;
    if (behind != nullptr) behind[found] = e.to, data[found] = e.data;
    ++found;
  }
  *count = found;
  return failure();
}
int cuGraphRemoveDependencies_v2(void*, void* const* from, void* const* to, const GraphEdge* data, size_t) {
  for (size_t i = 0; i < edges.size(); ++i) {
    const Edge& e = edges[i];
    if (e.from != *from || e.to != *to || e.data.type != data->type || e.data.from_port != data->from_port) continue;
    edges.erase(edges.begin() + i);
    return failure();
  }
  return 1;
}
int cuGraphAddDependencies_v2(void*, void* const* from, void* const* to, const GraphEdge* data, size_t) {
  edges.push_back({*from, *to, *data});
  return failure();
}
}
"""
MAIN = r"""
#include <ai3/graph_edges.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

using ai3::cuda::EdgesInto;
using ai3::cuda::GraphEdge;
struct Edge { void *from, *to; GraphEdge data; };
extern "C" {
extern std::vector<Edge> edges;
extern std::vector<void*> last;
extern int capturing, calls_until_failure;
}

int main(int, char** argv) {
  int nodes[4];
  const GraphEdge early{1, 0, 1, {}};
  edges.push_back({&nodes[0], &nodes[3], early});  // of another stream, there before
  last = {&nodes[0]};
  capturing = std::strcmp(argv[1], "not capturing") != 0;
  if (!std::strcmp(argv[1], "failing")) calls_until_failure = std::atoi(argv[2]);
  EdgesInto into(nullptr);
  edges.push_back({&nodes[0], &nodes[1], std::strcmp(argv[1], "full") ? early : GraphEdge{}});
  last = {&nodes[1]};
  const bool to_the_end = !std::strcmp(argv[1], "to the end");
  const int error = into.become(to_the_end ? ai3::cuda::kAfterTheEnd : ai3::cuda::kAfterTheStart);
  std::printf("%d %d", into.is_capturing(), error);
  for (const Edge& e : edges)
    std::printf(" %d>%d:%d.%d", int(static_cast<int*>(e.from) - nodes), int(static_cast<int*>(e.to) - nodes),
                e.data.from_port, e.data.type);
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the program prints: whether a stream is captured, the error, and the edges with their ports and types."""
    folder = tmp_path_factory.mktemp("edges")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = ["-std=c++20", f"-I{builder.INCLUDE}"]
    for name, source in (("driver.cpp", DRIVER), ("main.cpp", MAIN)):
        (folder / name).write_text(source)
    driver, program = folder / "libcuda.so.1", folder / "main"
    subprocess.run([*compiler, *flags, "-shared", "-fPIC", folder / "driver.cpp", "-o", driver], check=True)
    links = [driver, f"-Wl,-rpath,{folder}", "-ldl"]
    subprocess.run([*compiler, *flags, folder / "main.cpp", "-o", program, *links], check=True)

    def call(*arguments: str) -> str:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
        done = subprocess.run([program, *arguments], env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    return call


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("to the start", "1 0 0>3:1.1 0>1:2.1"),
        ("to the end", "1 0 0>3:1.1 0>1:0.0"),
        ("full", "1 0 0>3:1.1 0>1:0.0"),
        ("not capturing", "0 0 0>3:1.1 0>1:1.1"),
    ],
)
def test_only_edges_that_are_new_and_programmatic_change(run, case, found):
    assert run(case) == found


@pytest.mark.parametrize("calls", range(7))
def test_an_error_of_the_drivers_is_given(run, calls):
    assert run("failing", str(calls)).split()[1] == "700"
