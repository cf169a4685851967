// Runs the CUDA kernels in the emulator against plain float64 definitions.
//
//   test_kernels parity [quick] [GROUP [TILE]]  every tile, dtype and activation over odd shapes,
//   in
//                                               several orders of threads; GROUP: block, grid, ...
//   test_kernels faults       each barrier and shuffle left out in turn, and other faults
//   test_kernels plan [print] plans for real devices
//   test_kernels rooflines    the table of docs/cuda.md
//   test_kernels races        a few launches, for a build with a sanitizer
//   test_kernels race         one launch without a barrier, for ThreadSanitizer to report
//
// Prints one line for each group, and FAIL lines; the exit status is the number of failures, at
// most 100.
#include <chrono>
#include <cstring>
#include <set>

#include "problem.h"

namespace charrnn_fast::cuda {
namespace {

std::string wanted_group;

// Runs a group of checks if it is wanted, and says how many it made in what time.
void group(const char* name, const std::function<void()>& body) {
  if (!wanted_group.empty() && wanted_group != name) return;
  const int64_t before = checks;
  const auto start = std::chrono::steady_clock::now();
  body();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%-8s %6lld checks in %.0f s\n", name, static_cast<long long>(checks - before),
              seconds.count());
  std::fflush(stdout);
}

void parity(bool quick) {
  group("block", [=] { block_parity(quick); });
  group("grid", [=] { grid_parity(quick); });
  group("step", step_parity);
  group("tokens", token_parity);
  group("generate", [=] { generate_parity(quick); });
  std::printf("%lld launches (%lld cooperative), %lld turns of fibers\n",
              static_cast<long long>(emulator::settings.launches),
              static_cast<long long>(emulator::settings.cooperative_launches),
              static_cast<long long>(emulator::settings.turns));
}

// Runs a body that is to fail, and says whether it did.
bool caught(const std::function<void()>& body) {
  const int before = failures;
  failures = 1000;  // silent
  using emulator::Order;
  for (int i = 0; i < 16 && failures == 1000; ++i) {
    const Order order = i < 3 ? static_cast<Order>(i) : Order::kUneven;
    emulator::settings.order = order;
    ++emulator::settings.seed;
    body();
    emulator::settings.fault.clear();
  }
  emulator::settings.order = emulator::Order::kForward;
  const bool found = failures > 1000;
  failures = before;
  return found;
}

void every_site(const char* name, const std::function<void()>& body) {
  emulator::settings.sites.clear();
  body();
  const std::set<int> sites = emulator::settings.sites;
  for (int site : sites) {
    emulator::settings.skip_site = site;
    ++checks;
    const bool found = caught(body);
    emulator::settings.skip_site = 0;
    std::printf("  %s without the barrier or shuffle of line %d: %s\n", name, site,
                found ? "caught" : "NOT CAUGHT");
    if (!found)
      fail(std::string(name) + ": nothing noticed that line " + std::to_string(site) +
           " was left out");
  }
}

void faults() {
  const Case small{6, 5, 60, 2, Dtype::kFloat32, Cell::kTanh, Case::kRagged, true};
  const Case middle{5, 20, 260, 2, Dtype::kFloat32, Cell::kTanh, Case::kFull, true};
  const Problem block_problem(small, 5), grid_problem(middle, 6);
  const LaunchPlan block = plan_for(Design::kBlock, 1, small, 3);
  const LaunchPlan grid = plan_for(Design::kGrid, 0, middle, 20);
  for (bool backward : {false, true}) {
    every_site(backward ? "block backward" : "block forward",
               [&] { run(block_problem, block, backward, "fault"); });
    every_site(backward ? "grid backward" : "grid forward",
               [&] { run(grid_problem, grid, backward, "fault"); });
  }
  every_site("generate", generate_once);
  const auto expect = [](const char* name, bool found) {
    ++checks;
    std::printf("  %s: %s\n", name, found ? "caught" : "NOT CAUGHT");
    if (!found) fail(std::string(name) + " was not noticed");
  };
  emulator::settings.skip_grid_barrier = true;
  expect("no grid barrier", caught([&] { run(grid_problem, grid, false, "fault"); }));
  emulator::settings.skip_grid_barrier = false;
#if !defined(__SANITIZE_ADDRESS__)
  // Shared memory four bytes short: the last thread's weights are stored beyond its end.
  const Case spilling{2, 1, 256, 1, Dtype::kFloat32, Cell::kTanh, Case::kFull, true};
  const Problem spilling_problem(spilling, 7);
  emulator::settings.shared_missing = 4;
  expect("a store past shared memory", caught([&] {
           run(spilling_problem, plan_for(Design::kBlock, 7, spilling, 1), false, "fault");
         }));
  emulator::settings.shared_missing = 0;
  // One sequence too many: rows beyond the end of y and h_n, inside the guards.
  expect("a store past the end of y", caught([&] {
           Case more{1, 2, 8, 1, Dtype::kFloat32, Cell::kTanh, Case::kFull, false};
           Problem problem(more, 8);
           problem.c.H = 8;
           Memory out(1 * 1 * 8, Dtype::kFloat32), final(8, Dtype::kFloat32);
           RecurrenceArgs args{};
           args.T = 1;
           args.B = 2;
           args.H = 8;
           args.D = 1;
           args.W_hh[0] = problem.W[0].data();
           args.in = problem.z.data();
           args.out = out.data();
           args.final = final.data();
           const LaunchPlan plan = plan_for(Design::kBlock, 0, more, 2);
           (void)charrnn_fast_cuda_forward(&plan, &args, nullptr);
           if (!out.intact() || !final.intact()) fail("caught");
         }));
#endif
  // More blocks than are resident would wait for ever; the launch itself refuses.
  emulator::settings.resident_blocks = 3;
  expect("a cooperative launch that does not fit",
         caught([&] { run(grid_problem, grid, false, "fault"); }));
  emulator::settings.resident_blocks = 1 << 30;
  emulator::settings.refuse_launch = true;
  expect("a launch that fails", caught([&] { run(block_problem, block, false, "fault"); }));
  emulator::settings.refuse_launch = false;
  // And without any fault nothing is caught.
  for (bool backward : {false, true}) {
    ++checks;
    if (caught([&] {
          run(block_problem, block, backward, "no fault");
          run(grid_problem, grid, backward, "no fault");
          generate_once();
        })) {
      fail("a fault was reported where there is none");
    }
  }
}

void races() {
  for (int layout = 0; layout < 3; ++layout) {
    const Case small{4,   3, 60, 2, Dtype::kFloat32, Cell::kTanh, static_cast<Case::Layout>(layout),
                     true};
    const Case spilling{
        2, 2, 250, 1, Dtype::kBFloat16, Cell::kRelu, static_cast<Case::Layout>(layout), true};
    const Case middle{
        3, 9, 200, 2, Dtype::kFloat32, Cell::kTanh, static_cast<Case::Layout>(layout), true};
    const Problem a(small, 5), b(spilling, 6), c(middle, 7);
    for (bool backward : {false, true}) {
      in_every_order(
          [&] {
            run(a, plan_for(Design::kBlock, 1, small, 2), backward, "races");
            run(b, plan_for(Design::kBlock, 7, spilling, 2), backward, "races");
            run(c, plan_for(Design::kGrid, 0, middle, 5), backward, "races");
          },
          layout > 0);
    }
  }
  step_parity();
  token_parity();
  generate_parity(true);
}

int run_tests(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "parity";
  const bool quick = argc > 2 && std::strcmp(argv[2], "quick") == 0;
  if (what == "parity" && argc > 2 + quick) wanted_group = argv[2 + quick];
  if (what == "parity" && argc > 3 + quick) wanted_tile = std::atoi(argv[3 + quick]);
  if (what == "parity") parity(quick);
  if (what == "faults") faults();
  if (what == "plan") plans(argc > 2 && std::strcmp(argv[2], "print") == 0);
  if (what == "rooflines") {
    rooflines();
    return 0;
  }
  if (what == "races") races();
  if (what == "race") {
    const Case small{3, 2, 60, 1, Dtype::kFloat32, Cell::kTanh, Case::kFull, true};
    const Problem problem(small, 5);
    emulator::settings.sites.clear();
    run(problem, plan_for(Design::kBlock, 1, small, 2), false, "race");
    emulator::settings.skip_site = *emulator::settings.sites.rbegin();  // the barrier of each step
    run(problem, plan_for(Design::kBlock, 1, small, 2), false, "race");
  }
  std::printf("%s: %lld checks, %d failures\n", what.c_str(), static_cast<long long>(checks),
              failures);
  return std::min(failures, 100);
}

}  // namespace
}  // namespace charrnn_fast::cuda

int main(int argc, char** argv) { return charrnn_fast::cuda::run_tests(argc, argv); }
