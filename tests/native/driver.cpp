// Runs the kernels, without torch, on random sizes, strides, orders and teams, and holds them to:
//   - no access outside a buffer: every buffer ends at an inaccessible page, or begins after one;
//   - the formula, written naively in double below;
//   - the same bits for every team and split, and for a sequence alone as among others;
//   - nothing written that is not theirs: gaps between rows, rows outside every sequence;
//   - indices of 64 bits: some rows lie gigabytes apart;
//   - the modes of floating-point arithmetic as they were, and no invalid operation from sound
//   input.
// Usage: driver [cases] [seed] [isa ...]
//        driver overrun N: reads one byte past buffer N, and must die of it (N past the last: 2)
#include <fenv.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "rnn.h"

using namespace charrnn_fast;

namespace {

std::mt19937_64 generator;
std::string current;  // what is being run, for messages
int overrun = -1;     // the buffer to read past, to see that it is noticed

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n  in %s\n", what.c_str(), current.c_str());
  std::exit(1);
}

int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }
bool coin() { return below(2) == 1; }

// Memory with an inaccessible page at one end. Buffers that end at it start at any multiple of the
// element size, as views into tensors may.
class Guarded {
 public:
  Guarded(size_t bytes, bool at_end, size_t alignment = 1) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t body = (bytes + page - 1) / page * page + page;
    size_ = body + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) fail("mmap");
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + body, page, PROT_NONE);
    const size_t padded = (bytes + alignment - 1) / alignment * alignment;
    data = at_end ? base_ + page + body - padded : base_ + page;
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data;

 private:
  char* base_;
  size_t size_;
};

// `rows` rows of `width` elements, ld apart; the last row ends where the buffer ends. Of gaps
// longer than a page only the beginning is filled and looked at.
template <typename T>
struct Array {
  Array(int64_t rows, int64_t width, int64_t ld, bool at_end)
      : rows(rows),
        width(width),
        ld(ld),
        size(rows > 0 ? (rows - 1) * ld + width : 0),
        memory(static_cast<size_t>(size) * sizeof(T), at_end),
        data(reinterpret_cast<T*>(memory.data)) {}
  T& at(int64_t row, int64_t column) { return data[row * ld + column]; }
  // Elements of a row, and of the gap after it, to fill and look at.
  int64_t columns(int64_t row) const {
    return row == rows - 1 ? width : std::min<int64_t>(ld, width + 1024);
  }
  void fill(T value) {
    for (int64_t row = 0; row < rows; ++row) std::fill_n(&at(row, 0), columns(row), value);
  }
  const char* end() const { return reinterpret_cast<const char*>(data + size); }

  int64_t rows, width, ld, size;
  Guarded memory;
  T* data;
};

double number(double value) { return value; }
double number(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename T>
T made(double value) {
  return static_cast<T>(value);
}
template <>
bfloat16 made<bfloat16>(double value) {  // cut off, which will do for random numbers
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof(bits));
  return {static_cast<uint16_t>(bits >> 16)};
}

template <typename T>
std::unique_ptr<Array<T>> array(int64_t rows, int64_t width, int64_t gap = 0) {
  return std::make_unique<Array<T>>(rows, width, width + gap, overrun >= 0 || below(4) != 0);
}

template <typename T>
std::unique_ptr<Array<T>> randoms(int64_t rows, int64_t width, double scale, int64_t gap = 0) {
  auto a = array<T>(rows, width, gap);
  a->fill(made<T>(NAN));  // in the gaps
  std::normal_distribution<double> normal(0.0, scale);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) a->at(i, j) = made<T>(normal(generator));
  return a;
}

template <typename T>
T* pointer(const std::unique_ptr<Array<T>>& a) {
  return a ? a->data : nullptr;
}

void wait_at(void* state) { pthread_barrier_wait(static_cast<pthread_barrier_t*>(state)); }

// What a call may not change: rounding, flushing of denormals, which exceptions trap.
unsigned modes() {
#if defined(__x86_64__)
  return _mm_getcsr() & ~0x3fu;
#else
  return static_cast<unsigned>(fegetround());
#endif
}

template <typename Call>
void run_alone(const Call& call) {
  const unsigned before = modes();
  feclearexcept(FE_ALL_EXCEPT);
  call(Team{0, 1, nullptr, nullptr});
  if (modes() != before) fail("the modes of floating-point arithmetic were changed");
  if (fetestexcept(FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW)) {
    fail("a floating-point exception was raised by sound input");
  }
}

template <typename Call>
void run_team(int size, const Call& call) {
  if (size == 1) return run_alone(call);
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, static_cast<unsigned>(size));
  std::vector<std::thread> members;
  for (int rank = 0; rank < size; ++rank)
    members.emplace_back([&, rank] { call(Team{rank, size, wait_at, &barrier}); });
  for (auto& member : members) member.join();
  pthread_barrier_destroy(&barrier);
}

double apply(Activation activation, double a) {
  switch (activation) {
    case Activation::kTanh:
      return std::tanh(a);
    case Activation::kRelu:
      return a > 0 ? a : 0;
    default:
      return 1 / (1 + std::exp(-a));
  }
}

double slope(Activation activation, double y) {
  switch (activation) {
    case Activation::kTanh:
      return 1 - y * y;
    case Activation::kRelu:
      return y > 0 ? 1 : 0;
    default:
      return y * (1 - y);
  }
}

// One random problem, and what the kernels made of it.
template <typename scalar>
struct Problem {
  int64_t T, B, N, I, H;
  Activation activation;
  bool reverse, ragged;
  std::vector<int64_t> lengths, order;  // of each slot: steps, row within a step
  std::vector<int64_t> step_row;
  std::unique_ptr<Array<int64_t>> lengths_array, order_array, step_row_array, ids;
  std::unique_ptr<Array<scalar>> x, W_ih, W_hh, b_ih, b_hh, h0, dy, dh_n;
  int64_t y_gap;

  int64_t row(int64_t t, int64_t slot) const {
    return (step_row.empty() ? t * B : step_row[t]) + order[slot];
  }
  Sequences sequences() const {
    return {T, B, N, pointer(step_row_array), pointer(lengths_array), pointer(order_array)};
  }
};

int64_t random_size(int64_t small, int64_t large) { return 1 + below(below(8) ? small : large); }

// Between rows: mostly none or few elements, sometimes so many that 32 bits do not count them; with
// -DDENSE never, as emulators and ThreadSanitizer keep notes of every page, used or not; nor
// between so many rows that addresses run out.
int64_t random_gap(int64_t width, int64_t rows) {
#ifdef DENSE
  const int64_t kind = 1 + below(39);
#else
  const int64_t kind = below(40);
#endif
  const bool huge = kind == 0 && rows <= 1000;
  return huge ? (int64_t{1} << 31) + below(9) : kind < 20 ? below(5) : kind < 25 ? width : 0;
}

std::unique_ptr<Array<int64_t>> copied(const std::vector<int64_t>& values) {
  auto a = array<int64_t>(1, static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), a->data);
  return a;
}

struct Sizes {
  int64_t T, B, I, H;
};
Sizes random_sizes() {
  const int64_t T = random_size(9, 90), B = random_size(9, 70);
  const int64_t I = random_size(40, 150), H = random_size(40, 300);
  return {T, B, I, H};
}

template <typename scalar>
Problem<scalar> random_problem(const Sizes& sizes, bool ids) {
  Problem<scalar> p;
  p.T = sizes.T, p.B = sizes.B, p.I = sizes.I, p.H = sizes.H;
  p.activation = static_cast<Activation>(below(3));
  p.reverse = coin();
  p.lengths.assign(p.B, p.T);
  p.order.resize(p.B);
  std::iota(p.order.begin(), p.order.end(), 0);
  p.N = p.T * p.B;
  const int64_t layout = below(3);  // padded; packed; padded with lengths
  p.ragged = layout != 0;
  if (p.ragged) {
    for (auto& length : p.lengths) length = 1 + below(p.T);
    std::sort(p.lengths.rbegin(), p.lengths.rend());
    p.lengths[0] = p.T;
    p.lengths_array = copied(p.lengths);
  }
  if (layout == 1) {
    int64_t row = 0;
    for (int64_t t = 0; t < p.T; ++t) {
      p.step_row.push_back(row);
      for (int64_t i = 0; i < p.B; ++i) row += p.lengths[i] > t;
    }
    p.N = row;
    p.step_row_array = copied(p.step_row);
  }
  if (layout == 2) {
    std::shuffle(p.order.begin(), p.order.end(), generator);
    p.order_array = copied(p.order);
  }
  const double scale = 0.7 / std::sqrt(static_cast<double>(p.H));
  if (ids) {
    p.ids = array<int64_t>(1, p.N);
    for (int64_t i = 0; i < p.N; ++i) p.ids->data[i] = below(p.I);
  } else {
    p.x = randoms<scalar>(p.N, p.I, 1.0, random_gap(p.I, p.N));
  }
  p.W_ih = randoms<scalar>(p.H, p.I, 1 / std::sqrt(static_cast<double>(p.I)));
  p.W_hh = randoms<scalar>(p.H, p.H, scale);
  if (coin()) p.b_ih = randoms<scalar>(1, p.H, 0.3);
  if (p.b_ih) p.b_hh = randoms<scalar>(1, p.H, 0.3);
  if (coin()) p.h0 = randoms<scalar>(p.B, p.H, 0.5);
  p.y_gap = random_gap(p.H, p.N);
  if (below(5)) p.dy = randoms<scalar>(p.N, p.H, 1.0, random_gap(p.H, p.N));
  if (coin() || !p.dy) p.dh_n = randoms<scalar>(p.B, p.H, 1.0);
  return p;
}

template <typename scalar>
struct Forward {
  std::unique_ptr<Array<scalar>> y, h_n;
};

template <typename scalar>
struct Backward {
  std::unique_ptr<Array<scalar>> dx, dh0, dW_ih, dW_hh, db;
};

// Stands for a kernel that reads past the end of one buffer.
void read_past(const std::vector<const char*>& ends) {
  if (overrun >= static_cast<int>(ends.size())) std::exit(2);
  std::printf("read %d\n", *static_cast<const volatile char*>(ends[overrun]));
}

template <typename scalar>
Forward<scalar> forward(const Kernels<scalar>& kernels, const Problem<scalar>& p, Split split,
                        int team) {
  Forward<scalar> out{array<scalar>(p.N, p.H, p.y_gap), array<scalar>(p.B, p.H)};
  out.y->fill(made<scalar>(NAN));
  out.h_n->fill(made<scalar>(NAN));
  ForwardArgs<scalar> args{};
  args.seq = p.sequences();
  args.I = p.I;
  args.H = p.H;
  args.activation = p.activation;
  args.reverse = p.reverse;
  args.split = split;
  args.x = pointer(p.x);
  args.ldx = p.x ? p.x->ld : 0;
  args.ids = pointer(p.ids);
  args.W_ih = p.W_ih->data;
  args.W_hh = p.W_hh->data;
  args.b_ih = pointer(p.b_ih);
  args.b_hh = pointer(p.b_hh);
  args.h0 = pointer(p.h0);
  args.y = out.y->data;
  args.ldy = out.y->ld;
  args.h_n = out.h_n->data;
  Guarded workspace(kernels.forward_workspace(args, team), coin(), 64);
  args.workspace = workspace.data;
  run_team(team, [&](const Team& member) { kernels.forward(args, member); });
  if (overrun >= 0)
    read_past({out.y->end(), out.h_n->end(), p.W_ih->end(), p.W_hh->end(), p.x->end(), p.h0->end(),
               p.b_ih->end(), p.b_hh->end(), p.lengths_array->end(), p.order_array->end()});
  return out;
}

// Bits of `wanted`: dx, dh0, dW_ih, dW_hh, db.
template <typename scalar>
Backward<scalar> backward(const Kernels<scalar>& kernels, const Problem<scalar>& p,
                          const Array<scalar>& y, Split split, int team, int wanted) {
  Backward<scalar> out;
  const scalar nan = made<scalar>(NAN);
  const auto output = [&](int bit, int64_t rows, int64_t width) {
    std::unique_ptr<Array<scalar>> a;
    if (wanted >> bit & 1) {
      a = array<scalar>(rows, width);
      a->fill(nan);
    }
    return a;
  };
  if (p.x) out.dx = output(0, p.N, p.I);
  out.dh0 = output(1, p.B, p.H);
  out.dW_ih = output(2, p.H, p.I);
  out.dW_hh = output(3, p.H, p.H);
  out.db = output(4, 1, p.H);
  auto delta = array<scalar>(p.N, p.H);
  delta->fill(nan);
  BackwardArgs<scalar> args{};
  args.seq = p.sequences();
  args.I = p.I;
  args.H = p.H;
  args.activation = p.activation;
  args.reverse = p.reverse;
  args.split = split;
  args.x = pointer(p.x);
  args.ldx = p.x ? p.x->ld : 0;
  args.ids = pointer(p.ids);
  args.W_ih = p.W_ih->data;
  args.W_hh = p.W_hh->data;
  args.h0 = pointer(p.h0);
  args.y = y.data;
  args.ldy = y.ld;
  args.dy = pointer(p.dy);
  args.lddy = p.dy ? p.dy->ld : 0;
  args.dh_n = pointer(p.dh_n);
  args.delta = delta->data;
  args.dx = pointer(out.dx);
  args.dh0 = pointer(out.dh0);
  args.dW_ih = pointer(out.dW_ih);
  args.dW_hh = pointer(out.dW_hh);
  args.db = pointer(out.db);
  Guarded workspace(kernels.backward_workspace(args, team), coin(), 64);
  args.workspace = workspace.data;
  run_team(team, [&](const Team& member) { kernels.backward(args, member); });
  return out;
}

template <typename scalar>
constexpr double kTolerance = 1e-4;
template <>
constexpr double kTolerance<double> = 1e-11;
template <>
constexpr double kTolerance<bfloat16> =
    0x1p-5;  // eight times its rounding: of each state and delta

// `largest` is the least size by which errors are judged.
template <typename scalar>
void expect_close(const char* name, Array<scalar>& got, const std::vector<double>& want,
                  double largest = 1) {
  for (double value : want) largest = std::max(largest, std::isnan(value) ? 0 : std::abs(value));
  const double tolerance = kTolerance<scalar> * largest;
  for (int64_t i = 0; i < got.rows; ++i) {
    for (int64_t j = 0; j < got.columns(i); ++j) {
      const double value = number(got.at(i, j));
      const double expected = j < got.width ? want[i * got.width + j] : NAN;  // NAN: not theirs
      if (std::isnan(expected) ? !std::isnan(value) : !(std::abs(value - expected) <= tolerance)) {
        char text[200];
        std::snprintf(text, sizeof text, "%s[%ld,%ld] is %.9g, expected %.9g", name,
                      static_cast<long>(i), static_cast<long>(j), value, expected);
        fail(text);
      }
    }
  }
}

template <typename scalar>
void expect_same_bits(const char* name, const std::unique_ptr<Array<scalar>>& a,
                      const std::unique_ptr<Array<scalar>>& b) {
  for (int64_t i = 0; a && i < a->rows; ++i) {
    const size_t bytes = static_cast<size_t>(a->columns(i)) * sizeof(scalar);
    if (std::memcmp(&a->at(i, 0), &b->at(i, 0), bytes) != 0)
      fail(std::string(name) + " differs in bits from the result of one thread");
  }
}

// Order of the steps of a sequence.
int64_t step(bool reverse, int64_t length, int64_t k) { return reverse ? length - 1 - k : k; }

template <typename scalar>
void check_forward(Problem<scalar>& p, Forward<scalar>& out) {
  std::vector<double> y(p.N * p.H, NAN), h_n(p.B * p.H), previous(p.H), sum(p.H);
  for (int64_t slot = 0; slot < p.B; ++slot) {
    for (int64_t j = 0; j < p.H; ++j) previous[j] = p.h0 ? number(p.h0->at(p.order[slot], j)) : 0;
    for (int64_t k = 0; k < p.lengths[slot]; ++k) {
      const int64_t row = p.row(step(p.reverse, p.lengths[slot], k), slot);
      for (int64_t j = 0; j < p.H; ++j) {
        double a = p.b_ih ? number(p.b_ih->data[j]) + number(p.b_hh->data[j]) : 0;
        if (p.ids) a += number(p.W_ih->at(j, p.ids->data[row]));
        for (int64_t i = 0; p.x && i < p.I; ++i)
          a += number(p.x->at(row, i)) * number(p.W_ih->at(j, i));
        for (int64_t i = 0; i < p.H; ++i) a += previous[i] * number(p.W_hh->at(j, i));
        sum[j] = apply(p.activation, a);
      }
      previous = sum;
      std::copy(sum.begin(), sum.end(), y.begin() + row * p.H);
    }
    std::copy(previous.begin(), previous.end(), h_n.begin() + p.order[slot] * p.H);
  }
  expect_close("y", *out.y, y);
  expect_close("h_n", *out.h_n, h_n);
}

template <typename scalar>
void check_backward(Problem<scalar>& p, Array<scalar>& y, Backward<scalar>& out) {
  std::vector<double> dx(p.N * p.I, NAN), dh0(p.B * p.H), dW_ih(p.H * p.I), dW_hh(p.H * p.H),
      db(p.H), dh(p.H), delta(p.H), sizes(p.H), sizes_hh(p.H * p.H);
  for (int64_t slot = 0; slot < p.B; ++slot) {
    const int64_t place = p.order[slot], length = p.lengths[slot];
    for (int64_t j = 0; j < p.H; ++j) dh[j] = p.dh_n ? number(p.dh_n->at(place, j)) : 0;
    for (int64_t k = length - 1; k >= 0; --k) {
      const int64_t row = p.row(step(p.reverse, length, k), slot);
      const int64_t before = k > 0 ? p.row(step(p.reverse, length, k - 1), slot) : -1;
      for (int64_t j = 0; j < p.H; ++j)
        delta[j] = (dh[j] + (p.dy ? number(p.dy->at(row, j)) : 0)) *
                   slope(p.activation, number(y.at(row, j)));
      std::fill(dh.begin(), dh.end(), 0.0);
      for (int64_t i = 0; i < p.I; ++i) dx[row * p.I + i] = 0;
      for (int64_t j = 0; j < p.H; ++j) {
        db[j] += delta[j];
        sizes[j] += std::abs(delta[j]);
        if (p.ids) dW_ih[j * p.I + p.ids->data[row]] += delta[j];
        for (int64_t i = 0; i < p.I; ++i) {
          dx[row * p.I + i] += delta[j] * number(p.W_ih->at(j, i));
          if (p.x) dW_ih[j * p.I + i] += delta[j] * number(p.x->at(row, i));
        }
        for (int64_t i = 0; i < p.H; ++i) {
          dh[i] += delta[j] * number(p.W_hh->at(j, i));
          const double h = before >= 0 ? number(y.at(before, i))
                           : p.h0      ? number(p.h0->at(place, i))
                                       : 0;
          dW_hh[j * p.H + i] += delta[j] * h;
          sizes_hh[j * p.H + i] += std::abs(delta[j] * h);
        }
      }
    }
    std::copy(dh.begin(), dh.end(), dh0.begin() + place * p.H);
  }
  if (out.dx) expect_close("dx", *out.dx, dx);
  if (out.dh0) expect_close("dh0", *out.dh0, dh0);
  // Sums may be small beside their terms, whose errors of half a per cent in bfloat16 they have.
  const bool coarse = std::is_same_v<scalar, bfloat16>;
  const auto size_of = [&](const std::vector<double>& terms) {
    return coarse ? std::max(1.0, std::ranges::max(terms) / 8) : 1;
  };
  const double size = size_of(sizes);
  if (out.dW_ih) expect_close("dW_ih", *out.dW_ih, dW_ih, size);
  if (out.dW_hh) expect_close("dW_hh", *out.dW_hh, dW_hh, size_of(sizes_hh));
  if (out.db) expect_close("db", *out.db, db, size);
}

// y of one sequence run alone has the bits that it has among the others.
template <typename scalar>
void check_alone(const Kernels<scalar>& kernels, Problem<scalar>& p, Forward<scalar>& all) {
  const int64_t slot = below(p.B);
  Problem<scalar> one{};
  one.T = one.N = p.lengths[slot];
  one.B = 1;
  one.I = p.I;
  one.H = p.H;
  one.activation = p.activation;
  one.reverse = p.reverse;
  one.lengths.assign(1, one.T);
  one.order.assign(1, 0);
  if (p.ids) one.ids = array<int64_t>(1, one.T);
  if (p.x) one.x = array<scalar>(one.T, one.I);
  if (p.h0) one.h0 = array<scalar>(1, one.H);
  for (int64_t t = 0; t < one.T; ++t) {
    const int64_t row = p.row(t, slot);
    if (p.ids) one.ids->data[t] = p.ids->data[row];
    if (p.x) std::copy_n(&p.x->at(row, 0), p.I, &one.x->at(t, 0));
  }
  if (p.h0) std::copy_n(&p.h0->at(p.order[slot], 0), p.H, one.h0->data);
  std::swap(one.W_ih, p.W_ih);
  std::swap(one.W_hh, p.W_hh);
  std::swap(one.b_ih, p.b_ih);
  std::swap(one.b_hh, p.b_hh);
  Forward<scalar> alone = forward(kernels, one, Split::kBatch, 1);
  std::swap(one.W_ih, p.W_ih);
  std::swap(one.W_hh, p.W_hh);
  std::swap(one.b_ih, p.b_ih);
  std::swap(one.b_hh, p.b_hh);
  for (int64_t t = 0; t < one.T; ++t)
    if (std::memcmp(&alone.y->at(t, 0), &all.y->at(p.row(t, slot), 0),
                    static_cast<size_t>(p.H) * sizeof(scalar)) != 0)
      fail("y of a sequence depends on the others in the batch");
}

// A problem with every buffer, past one of which forward() then reads.
void run_overrun() {
  for (;;) {
    Problem<float> p = random_problem<float>(random_sizes(), false);
    if (p.x && p.h0 && p.b_ih && p.lengths_array && p.order_array) {
      forward(*isa().f32, p, Split::kBatch, 1);
      return;
    }
  }
}

template <typename scalar>
constexpr const char* kName = "float";
template <>
constexpr const char* kName<double> = "double";
template <>
constexpr const char* kName<bfloat16> = "bfloat16";

template <typename scalar>
void run_case(const Kernels<scalar>& kernels) {
  const Sizes sizes = random_sizes();
  Problem<scalar> p = random_problem<scalar>(sizes, below(3) == 0);
  const int wanted = below(2) ? 31 : static_cast<int>(below(32));
  char text[300];
  std::snprintf(text, sizeof text,
                "%s, %s: T=%ld B=%ld N=%ld I=%ld H=%ld activation=%d reverse=%d ragged=%d ids=%d "
                "bias=%d h0=%d dy=%d dh_n=%d wanted=%d",
                current.c_str(), kName<scalar>, static_cast<long>(p.T), static_cast<long>(p.B),
                static_cast<long>(p.N), static_cast<long>(p.I), static_cast<long>(p.H),
                static_cast<int>(p.activation), p.reverse, p.ragged, p.ids != nullptr,
                p.b_ih != nullptr, p.h0 != nullptr, p.dy != nullptr, p.dh_n != nullptr, wanted);
  current = text;
  Forward<scalar> y = forward(kernels, p, Split::kBatch, 1);
  check_forward(p, y);
  Backward<scalar> gradients = backward(kernels, p, *y.y, Split::kBatch, 1, wanted);
  check_backward(p, *y.y, gradients);
  for (Split split : {Split::kBatch, Split::kHidden}) {
    const int team = 1 + static_cast<int>(below(5));
    Forward<scalar> other = forward(kernels, p, split, team);
    expect_same_bits("y", y.y, other.y);
    expect_same_bits("h_n", y.h_n, other.h_n);
    Backward<scalar> again = backward(kernels, p, *y.y, split, team, wanted);
    expect_same_bits("dx", gradients.dx, again.dx);
    expect_same_bits("dh0", gradients.dh0, again.dh0);
    expect_same_bits("dW_ih", gradients.dW_ih, again.dW_ih);
    expect_same_bits("dW_hh", gradients.dW_hh, again.dW_hh);
    expect_same_bits("db", gradients.db, again.db);
  }
  check_alone(kernels, p, y);
}

// The gradients of ids whose units are fewer than the members: some of those have nothing to add.
template <typename scalar>
void run_few_units_case(const Kernels<scalar>& kernels) {
  current += ", few units";
  for (const int64_t H : {1, 3}) {
    const Problem<scalar> p = random_problem<scalar>({40, 16, 38, H}, true);
    const Forward<scalar> y = forward(kernels, p, Split::kBatch, 1);
    const Backward<scalar> one = backward(kernels, p, *y.y, Split::kBatch, 1, 31);
    for (const int team : {4, 8, 10}) {
      const Backward<scalar> many = backward(kernels, p, *y.y, Split::kBatch, team, 31);
      expect_same_bits("dW_ih", one.dW_ih, many.dW_ih);
    }
  }
}

// The draw of the kernels by the plainest means: the first character whose share, with those of all
// before it, exceeds u.
template <typename scalar>
int64_t naive_draw(std::vector<double> scores, const GenerateArgs<scalar>& args, double u) {
  const auto best = std::max_element(scores.begin(), scores.end());
  if (args.temperature == 0) return best - scores.begin();
  std::vector<double> falling = scores;
  std::sort(falling.rbegin(), falling.rend());
  const double least = args.top_k > 0 && args.top_k < args.V ? falling[args.top_k - 1] : -INFINITY;
  const double most = *best;
  for (double& x : scores) x = x < least ? 0 : std::exp((x - most) / args.temperature);
  double sum = std::accumulate(scores.begin(), scores.end(), 0.0), reached = 0;
  // Of equals the first ones stay: where all units of relu are at zero, all scores may be equal.
  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  for (size_t i = 0; args.top_p < 1 && i < order.size(); ++i) {
    const double weight = scores[order[i]];
    if (reached >= args.top_p * sum) scores[order[i]] = 0;
    reached += weight;
  }
  sum = std::accumulate(scores.begin(), scores.end(), 0.0);
  reached = 0;
  for (int64_t v = 0; v < args.V; ++v) {
    reached += scores[v];
    if (reached > u * sum) return v;
  }
  return args.V - 1;
}

// A linear layer against the formula, and with the same bits for a team.
template <typename scalar>
void run_linear_case(const Kernels<scalar>& kernels) {
  const int64_t N = random_size(9, 400), I = random_size(40, 300), H = random_size(40, 150);
  auto x = randoms<scalar>(N, I, 1.0), W = randoms<scalar>(H, I, 1.0),
       b = randoms<scalar>(1, H, 1.0);
  const int team = 2 + static_cast<int>(below(4));
  char text[120];
  std::snprintf(text, sizeof text, "%s, linear: N=%ld I=%ld H=%ld team=%d", current.c_str(),
                static_cast<long>(N), static_cast<long>(I), static_cast<long>(H), team);
  current = text;
  const auto run = [&](int size) {
    auto y = array<scalar>(N, H);
    LinearArgs<scalar> args = {N, I, H, x->data, W->data, b->data, y->data, nullptr};
    Guarded workspace(kernels.linear_workspace(args), coin(), 64);
    args.workspace = workspace.data;
    run_team(size, [&](const Team& member) { kernels.linear(args, member); });
    return y;
  };
  const auto y = run(1), again = run(team);
  expect_same_bits("y", y, again);
  std::vector<double> want(N * H);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t j = 0; j < H; ++j) {
      want[n * H + j] = b->data[j];
      for (int64_t i = 0; i < I; ++i) want[n * H + j] += number(x->at(n, i)) * number(W->at(j, i));
    }
  }
  expect_close("y", *y, want);
}

bool never_stop(void*) { return false; }

// Characters of random streams against the formula, and of some of the streams alone.
template <typename scalar>
void run_generate_case(const Kernels<scalar>& kernels) {
  const int64_t N = 1 + below(12), S = random_size(9, 120), V = random_size(40, 300);
  const int64_t H = random_size(40, 150), layers = 1 + below(3);
  std::vector<std::unique_ptr<Array<scalar>>> own;
  std::array<std::vector<const scalar*>, 4> weights;
  const bool biases = coin();
  for (int64_t i = 0; i < layers; ++i) {
    const auto add = [&](int kind, int64_t rows, int64_t columns, double scale) {
      own.push_back(randoms<scalar>(rows, columns, scale));
      weights[kind].push_back(own.back()->data);
    };
    const double scale = 0.7 / std::sqrt(static_cast<double>(H));
    add(0, H, i == 0 ? V : H, i == 0 ? 1.0 : scale);
    add(1, H, H, scale);
    if (biases) add(2, 1, H, 0.3);
    if (biases) add(3, 1, H, 0.3);
  }
  auto W_out = randoms<scalar>(V, H, 3 / std::sqrt(static_cast<double>(H)));
  auto b_out = coin() ? randoms<scalar>(1, V, 0.3) : nullptr;
  auto state = randoms<scalar>(layers * S, H, 0.5);
  auto uniforms = array<scalar>(N, S);
  std::uniform_real_distribution<double> uniform(0.0, 0.999);
  for (int64_t i = 0; i < N * S; ++i) uniforms->data[i] = static_cast<scalar>(uniform(generator));
  auto tokens = array<int64_t>(1, S);
  for (int64_t s = 0; s < S; ++s) tokens->data[s] = below(V);
  GenerateArgs<scalar> args{};
  args.N = N;
  args.V = V;
  args.H = H;
  args.layers = layers;
  args.ld = S;
  args.activation = static_cast<Activation>(below(3));
  args.W_ih = weights[0].data();
  args.W_hh = weights[1].data();
  args.b_ih = biases ? weights[2].data() : nullptr;
  args.b_hh = biases ? weights[3].data() : nullptr;
  args.W_out = W_out->data;
  args.b_out = pointer(b_out);
  args.temperature = below(4) ? 0.3 + static_cast<double>(below(10)) / 7 : 0;
  args.top_k = coin() ? below(V + 3) : 0;
  args.top_p = coin() ? 1 : 0.1 + static_cast<double>(below(90)) / 101;
  args.stop = coin() ? never_stop : nullptr;
  char text[200];
  std::snprintf(text, sizeof text, "%s, generate: N=%ld S=%ld V=%ld H=%ld layers=%ld k=%ld p=%g",
                current.c_str(), static_cast<long>(N), static_cast<long>(S), static_cast<long>(V),
                static_cast<long>(H), static_cast<long>(layers), static_cast<long>(args.top_k),
                args.top_p);
  current = text;

  // Streams [first, last) of all of them.
  const auto run = [&](int64_t first, int64_t last, Array<int64_t>& drawn, Array<scalar>& after) {
    GenerateArgs<scalar> part = args;
    part.S = last - first;
    part.uniforms = uniforms->data + first;
    part.tokens = tokens->data + first;
    part.state = after.data + first * H;
    part.drawn = drawn.data + first;
    Guarded workspace(kernels.generate_workspace(part), coin(), 64);
    part.workspace = workspace.data;
    kernels.generate(part);
  };
  auto drawn = array<int64_t>(N, S), again = array<int64_t>(N, S);
  auto after = array<scalar>(layers * S, H), after_again = array<scalar>(layers * S, H);
  std::copy_n(state->data, state->size, after->data);
  std::copy_n(state->data, state->size, after_again->data);
  run(0, S, *drawn, *after);
  const int64_t cut = below(S);
  if (cut > 0) run(0, cut, *again, *after_again);
  run(cut, S, *again, *after_again);
  if (std::memcmp(drawn->data, again->data, static_cast<size_t>(N * S) * sizeof(int64_t)) != 0)
    fail("the characters of a stream depend on the others");
  expect_same_bits("state", after, after_again);

  int64_t other = 0;
  std::vector<double> x(H), sum(H), scores(V);
  for (int64_t s = 0; s < S; ++s) {
    int64_t id = tokens->data[s];
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t l = 0; l < layers; ++l) {
        scalar* h = &state->at(l * S + s, 0);
        for (int64_t j = 0; j < H; ++j) {
          sum[j] = biases ? static_cast<double>(args.b_ih[l][j]) + args.b_hh[l][j] : 0;
          if (l == 0) sum[j] += args.W_ih[0][j * V + id];
          for (int64_t k = 0; l > 0 && k < H; ++k) sum[j] += x[k] * args.W_ih[l][j * H + k];
          for (int64_t k = 0; k < H; ++k)
            sum[j] += static_cast<double>(h[k]) * args.W_hh[l][j * H + k];
        }
        for (int64_t j = 0; j < H; ++j) {
          x[j] = apply(args.activation, sum[j]);
          h[j] = static_cast<scalar>(x[j]);
        }
      }
      for (int64_t v = 0; v < V; ++v) {
        scores[v] = b_out ? b_out->data[v] : 0;
        for (int64_t k = 0; k < H; ++k) scores[v] += x[k] * args.W_out[v * H + k];
      }
      id = drawn->at(i, s);  // goes on from what was drawn, so that a difference stays one
      if (id < 0 || id >= V) fail("a character is outside the vocabulary");
      other += naive_draw(scores, args, uniforms->at(i, s)) != id;
    }
  }
  if (other > (sizeof(scalar) == 4 ? 1 + N * S / 500 : 0))
    fail(std::to_string(other) + " characters are not those of the formula");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "overrun") == 0) {
    overrun = std::atoi(argv[2]);
    run_overrun();
    return 0;
  }
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 200;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  for (const Isa* const* isa = isas(); *isa; ++isa) {
    bool chosen = argc <= 3;
    for (int i = 3; i < argc; ++i) chosen |= std::strcmp(argv[i], (*isa)->name) == 0;
    if (!chosen) continue;
    if (!(*isa)->supported()) {
      std::printf("%s: not supported by this CPU\n", (*isa)->name);
      continue;
    }
    for (int64_t i = 0; i < cases; ++i) {
      generator.seed(seed * 1000003 + static_cast<uint64_t>(i));
      current = std::string((*isa)->name) + ", seed " + std::to_string(seed) + ", case " +
                std::to_string(i);
      const auto run = [i](const auto& kernels) {
        if (i < 2)
          run_few_units_case(kernels);
        else if (i % 8 < 6)
          run_case(kernels);
        else if (i % 16 < 14)
          run_generate_case(kernels);
        else
          run_linear_case(kernels);
      };
      if ((*isa)->bf16 && i > 1 && i % 4 < 2)
        run_case(*(*isa)->bf16);
      else if (i % 2)
        run(*(*isa)->f64);
      else
        run(*(*isa)->f32);
    }
    std::printf("%s: %ld cases\n", (*isa)->name, static_cast<long>(cases));
  }
}
