// The tile registers of AMX: products of blocks of 16 rows and 16 columns whose sums stay in registers.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

// A register: 16 rows of 64 bytes.
constexpr int kRegisterRows = 16, kRegisterBytes = 64;

// Registers 0 to 3 are sums, two rows of two; 4 and 5 hold rows, 6 and 7 columns.
struct Bf16Registers {
  static void multiply_first_rows() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  static void multiply_second_rows() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

struct Int8Registers {
  static void multiply_first_rows() {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
  }
  static void multiply_second_rows() {
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
};

// The registers of this thread while it lives. Rows and sums have `rows` rows.
class TileRegisters {
 public:
  explicit TileRegisters(int64_t rows) {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shapes.bytes[i] = kRegisterBytes;
      shapes.rows[i] = static_cast<uint8_t>(i < 6 ? rows : kRegisterRows);
    }
    // GCC 12 takes the next instruction to read 8 bytes of the 64.
    asm volatile("" : : "r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Operands in memory: two registers of rows, two of columns side by side, four of sums; and what is fetched meanwhile.
// Distances are in bytes.
struct TileOperands {
  const void* rows[2];
  int64_t row_distance;
  const void* columns;  // a register of the inner dimension is 16 lines, of which these are the first 128 bytes
  int64_t column_distance;
  void* sums[2];
  int64_t sum_distance;
  const void* fetch;  // `lines` lines for each register of the inner dimension
  int64_t lines;
};

// sums[i] (+)= rows[i] times the columns, i < kCount, over `steps` registers. Not inlined: what it leaves in registers must
// not be mixed with what others do. By reference: a copy by vectors would wait for all stores before it.
template <class D, int kCount>
[[gnu::noinline]] void multiply_registers(const TileOperands& at, int64_t steps, bool add) {
  const char *columns = static_cast<const char*>(at.columns), *fetch = static_cast<const char*>(at.fetch);
  const char* const rows[2] = {static_cast<const char*>(at.rows[0]), static_cast<const char*>(at.rows[1])};
  char* const sums[2] = {static_cast<char*>(at.sums[0]), static_cast<char*>(at.sums[1])};
  asm volatile("" : : : "memory");  // the compiler does not see that registers are loaded from memory
  if (add) {
    _tile_loadd(0, sums[0], at.sum_distance);
    _tile_loadd(1, sums[0] + kRegisterBytes, at.sum_distance);
    if (kCount > 1) {
      _tile_loadd(2, sums[1], at.sum_distance);
      _tile_loadd(3, sums[1] + kRegisterBytes, at.sum_distance);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, columns += kRegisterRows * at.column_distance) {
    _tile_loadd(6, columns, at.column_distance);
    _tile_loadd(7, columns + kRegisterBytes, at.column_distance);
    _tile_loadd(4, rows[0] + step * kRegisterBytes, at.row_distance);
    D::multiply_first_rows();
    if (kCount > 1) {
      _tile_loadd(5, rows[1] + step * kRegisterBytes, at.row_distance);
      D::multiply_second_rows();
    }
    for (int64_t i = 0; i < at.lines; ++i, fetch += 64) __builtin_prefetch(fetch, 0, 3);
  }
  _tile_stored(0, sums[0], at.sum_distance);
  _tile_stored(1, sums[0] + kRegisterBytes, at.sum_distance);
  if (kCount > 1) {
    _tile_stored(2, sums[1], at.sum_distance);
    _tile_stored(3, sums[1] + kRegisterBytes, at.sum_distance);
  }
}

// The same for one or two registers of rows.
template <class D>
inline void multiply_registers(int64_t count, const TileOperands& at, int64_t steps, bool add) {
  count > 1 ? multiply_registers<D, 2>(at, steps, add) : multiply_registers<D, 1>(at, steps, add);
}

}  // namespace
