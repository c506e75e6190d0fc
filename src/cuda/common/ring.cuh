// SPDX-License-Identifier: Apache-2.0
// How a round of a tile's weights comes into shared memory, and how a lane finds its rows there.
//
// A Ring is a struct with
//   Source                  what fetch needs besides the arguments, made by the launcher
//   kOldestArch, kStageBytes
//   describe(args, inputs, source)   by the launcher
//   fetch(args, source, first_row, round, to, filled)   by one warp: starts the copies of a round
//   Lane(args, first_row)   a consumer's place; rows(stage) gives the first byte of this warp's
//                           unit in rows r, r + 8, r + 16, ... of the stage, r = lane / 4, as Bytes
//
// BoxRing has the copy engine arrange boxes of 128 bytes by the tile's rows so that eight rows are
// read without bank conflicts; it copies fastest. RowRing copies row by row, to rows that are
// padded for the same end; it takes rows at any address. Three more give each lane a row of its
// own: LaneBoxRing, boxes as those of BoxRing; LaneRowRing, which copies whole rows, for units that
// begin at odd places; and LaneAnyRing for rows at any address. nf4/scales.cuh has one that copies
// scales beside rows.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "baracuda/order.cuh"
#include "cuda/common/async.cuh"
#include "cuda/common/launch.cuh"

namespace bcy {

// Bytes of one row in one unit, and in one round of the eight partial sums.
template <class Format>
constexpr int kUnitBytes = kUnit / Format::kElements * Format::kBytes;
template <class Format>
constexpr int kRoundBytes = kPartials * kUnitBytes<Format>;

template <class Format>
BCY_INLINE int64_t row_bytes(int64_t ncols) {
  return ncols / Format::kElements * Format::kBytes;
}

template <class Format>
bool rows_on_boundaries(const ProductArgs& args) {
  return row_bytes<Format>(args.ncols) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(args.weight) % 16 == 0;
}

template <class Format>
__device__ __forceinline__ uint32_t round_length(int64_t ncols, int round) {
  return uint32_t(min(int64_t{kRoundBytes<Format>},
                      row_bytes<Format>(ncols) - int64_t{round} * kRoundBytes<Format>));
}

constexpr int greatest_power_of_two_in(int n, int most) {
  return most == 1 || n % most == 0 ? most : greatest_power_of_two_in(n, most / 2);
}

// What is known of the address of a unit in a row on a 16-byte boundary.
template <class Format>
constexpr int kUnitAlignment = kUnitBytes<Format> % 4 == 0 ? 4 : 2;

template <class Row, int Rows>
struct RowsOf {
  Row row[Rows / 8];
};

constexpr int kBoxBytes = 128;

// Describes a matrix of bytes to the copy engine, in boxes of kBoxBytes by `rows`; neighbours: the
// box beside one is fetched with it.
int describe_boxes(const void* matrix, int64_t bytes_of_row, int64_t nrows, int rows,
                   bool neighbours, CUtensorMap& map);

// The same in boxes of `bytes`, a multiple of 16, whose rows follow each other; places are counted
// in elements of eight bytes.
constexpr int kPlainElement = 8;
constexpr int kMostPlainBoxBytes = 256 * kPlainElement;
int describe_plain_boxes(const void* matrix, int64_t bytes_of_row, int64_t nrows, int bytes,
                         int rows, bool neighbours, CUtensorMap& map);

// Whether the copy engine can bring a weight's rows, and as boxes, whose places are 32 bits: lanes
// that have rows of their own take either.
inline bool has_copies(const ProductArgs& args, const Device& device) {
  return device.arch >= 900 && args.ncols > 0 && args.nrows <= INT32_MAX;
}
template <class Format>
bool has_boxes(const ProductArgs& args, const Device& device) {
  return has_copies(args, device) && rows_on_boundaries<Format>(args);
}

// ---- boxes ------------------------------------------------------------------------------------------------------

// Bytes of one row that lies in boxes: byte o of a row is in box o / 128, whose 16-byte pieces are
// exchanged by the row's number.
template <int Alignment, int Rows>
struct BoxBytes {
  static constexpr int kAlignment = Alignment;
  const uint8_t* base;  // of this row in the first box
  uint32_t exchange;  // 16 * (row % 8)
  int lane;  // a multiple of Alignment
  int at;  // a constant where it is used

  __device__ __forceinline__ BoxBytes operator+(int offset) const {
    return {base, exchange, lane, at + offset};
  }
  // The same with an offset that is no constant.
  template <int Other>
  __device__ __forceinline__ BoxBytes<Other, Rows> moved(int offset) const {
    return {base, exchange, lane + at + offset, 0};
  }
  __device__ __forceinline__ const uint8_t* place(int o) const {
    return base + (o / kBoxBytes * (Rows * kBoxBytes) + ((o % kBoxBytes) ^ exchange));
  }
  __device__ __forceinline__ uint32_t word(int o) const {
    return *reinterpret_cast<const uint32_t*>(place(o));
  }
  // Up to 16 bytes at a multiple of their size, where the alignment is as much.
  template <class Wide>
  __device__ __forceinline__ Wide load(int offset) const {
    return *reinterpret_cast<const Wide*>(place(lane + at + offset));
  }

  __device__ __forceinline__ uint32_t load8(int offset) const { return *place(lane + at + offset); }
  __device__ __forceinline__ uint32_t load16(int offset) const {
    if (Alignment >= 2 && (at + offset) % 2 == 0) {
      return *reinterpret_cast<const uint16_t*>(place(lane + at + offset));
    }
    return load8(offset) | load8(offset + 1) << 8;
  }
  __device__ __forceinline__ uint32_t load32(int offset, int variable) const {
    const int start = at + offset;
    if (Alignment >= 4) {
      const int o = lane + (start & ~3) + variable;
      if (start % 4 == 0) return word(o);
      return __byte_perm(word(o), word(o + 4), 0x3210 + 0x1111 * (start & 3));
    }
    const int o = lane + start + variable;
    return __byte_perm(word(o & ~3), word((o & ~3) + 4), 0x3210 + 0x1111 * (o & 3));
  }
  __device__ __forceinline__ float load_half(int offset) const {
    return half_to_float(uint16_t(load16(offset)));
  }
};

template <class Format, int Rows>
struct BoxRing {
  using Source = CUtensorMap;
  static constexpr int kOldestArch = 900;
  static constexpr int kBoxes = (kRoundBytes<Format> + kBoxBytes - 1) / kBoxBytes;
  static constexpr int kStageBytes = kBoxes * Rows * kBoxBytes;

  template <class Inputs>
  static int describe(const ProductArgs& args, const Inputs&, Source& source) {
    return describe_boxes(args.weight, row_bytes<Format>(args.ncols), args.nrows, Rows, true,
                          source);
  }

  // The last box of a round reaches into the next one; what lies past the matrix is zeros.
  static __device__ __forceinline__ void fetch(const ProductArgs& args, const Source& source,
                                               int64_t first_row, int round, uint8_t* to,
                                               uint64_t* filled) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const int lane = threadIdx.x % 32;
    const int boxes = int(round_length<Format>(args.ncols, round) + kBoxBytes - 1) / kBoxBytes;
    expect_copies(filled, lane < boxes ? Rows * kBoxBytes : 0);
    if (lane < boxes) {
      copy_box(to + lane * (Rows * kBoxBytes), &source,
               round * kRoundBytes<Format> + lane * kBoxBytes, int(first_row), filled);
    }
#endif
  }

  struct Lane {
    int lane;
    __device__ __forceinline__ Lane(const ProductArgs&, int64_t)
        : lane(int(threadIdx.x / 32) * kUnitBytes<Format>) {}
    using Row = BoxBytes<kUnitAlignment<Format>, Rows>;
    __device__ __forceinline__ RowsOf<Row, Rows> rows(const uint8_t* stage) const {
      const int r = threadIdx.x % 32 / 4;
      RowsOf<Row, Rows> result;
#pragma unroll
      for (int i = 0; i < Rows / 8; ++i) {
        result.row[i] = {stage + r * kBoxBytes + i * (8 * kBoxBytes), uint32_t(16 * r), lane, 0};
      }
      return result;
    }
  };
};

// ---- rows -------------------------------------------------------------------------------------------------------

// Bytes from the 16-byte boundary before a row to the row.
template <class Format>
__device__ __forceinline__ int off_boundary(const ProductArgs& args, int64_t row) {
  const auto first = reinterpret_cast<uintptr_t>(args.weight);
  return int((first + row * row_bytes<Format>(args.ncols)) % 16);
}

// The copy of consecutive bytes.
struct RowCopy {
  const uint8_t* from;
  uint8_t* to;
  uint32_t bytes;

  // To 16-byte boundaries, but not past the matrix: what would lie there is copied byte by byte.
  // Whether there was any.
  __device__ __forceinline__ bool widen(const uint8_t* first, const uint8_t* last) {
    bool stored = false;
    const uint32_t ahead = uint32_t(reinterpret_cast<uintptr_t>(from) % 16);
    from -= ahead;
    bytes = (ahead + bytes + 15) / 16 * 16;
    if (from + bytes > last) {
      bytes -= 16;
      const uint8_t* p = from + bytes > first ? from + bytes : first;
      for (; p < last; ++p) to[p - from] = *p;
      stored = true;
    }
    if (bytes > 0 && from < first) {
      for (int i = int(first - from); i < 16; ++i) to[i] = from[i];
      from += 16;
      to += 16;
      bytes -= 16;
      stored = true;
    }
    return stored;
  }
};

// By a whole warp: starts the copy of a round of each lane's row to `to`, or, of a row off 16-byte
// boundaries, to as many bytes behind it as the row is off. Rows past the end are left out; what
// their lanes compute is not stored.
template <class Format, bool Aligned>
__device__ __forceinline__ void fetch_rows(const ProductArgs& args, int64_t row, bool copies,
                                           int round, uint8_t* to, uint64_t* filled) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const int64_t bytes_of_row = row_bytes<Format>(args.ncols);
  const uint8_t* const first = static_cast<const uint8_t*>(args.weight);
  const bool exists = copies && row < args.nrows;
  RowCopy copy = {first + row * bytes_of_row + int64_t{round} * kRoundBytes<Format>, to,
                  exists ? round_length<Format>(args.ncols, round) : 0};
  if (!Aligned) {
    const bool stored = exists && copy.widen(first, first + args.nrows * bytes_of_row);
    if (__reduce_add_sync(~0u, unsigned{stored}) > 0) order_stores_of_warp();
  }
  expect_copies(filled, copy.bytes);
  if (copy.bytes > 0) copy_row(copy.to, copy.from, copy.bytes, filled);
  copies_issued(filled);
#endif
}

// Rings whose rows are copied one by one, which needs no description of the matrix.
struct RowCopies {
  struct Source {};
  template <class Inputs>
  static int describe(const ProductArgs&, const Inputs&, Source&) {
    return BCY_OK;
  }
};

// Aligned: rows start on 16-byte boundaries. Room: bytes behind a round of each row, for what else
// is copied of it.
template <class Format, int Rows, bool Aligned, int Room = 0>
struct RowRing : RowCopies {
  static constexpr int kOldestArch = 800;
  // The distance of two rows is an odd multiple of 16 bytes, so that eight rows are read without
  // bank conflicts, and leaves room for what the copy of a row off 16 bytes takes along.
  static constexpr int kBytes = kRoundBytes<Format> + (Aligned ? 0 : 16) + Room;
  static constexpr int kPitch = kBytes + (kBytes % 32 == 16 ? 0 : 16);
  static constexpr int kStageBytes = (Rows * kPitch + 127) / 128 * 128;
  static_assert(Rows <= 32, "a lane copies a row");

  static __device__ __forceinline__ void fetch(const ProductArgs& args, const Source&,
                                               int64_t first_row, int round, uint8_t* to,
                                               uint64_t* filled) {
    const int lane = threadIdx.x % 32;
    fetch_rows<Format, Aligned>(args, first_row + lane, lane < Rows, round, to + lane * kPitch,
                                filled);
  }

  struct Lane {
    int ahead[Rows / 8];  // of each row's first byte, what its copy took along
    __device__ __forceinline__ Lane(const ProductArgs& args, int64_t first_row) {
#pragma unroll
      for (int i = 0; i < Rows / 8; ++i) {
        const int64_t row = first_row + threadIdx.x % 32 / 4 + 8 * i;
        ahead[i] = Aligned ? 0 : off_boundary<Format>(args, row);
      }
    }
    using Row = Bytes<Aligned ? kUnitAlignment<Format> : Format::kAlignment>;
    __device__ __forceinline__ RowsOf<Row, Rows> rows(const uint8_t* stage) const {
      const uint8_t* const first =
          stage + threadIdx.x % 32 / 4 * kPitch + int(threadIdx.x / 32) * kUnitBytes<Format>;
      RowsOf<Row, Rows> result;
#pragma unroll
      for (int i = 0; i < Rows / 8; ++i) result.row[i] = Row(first + 8 * i * kPitch + ahead[i]);
      return result;
    }
  };
};

// ---- a row to each lane ------------------------------------------------------------------------------------------

constexpr int kLaneRows = 32;
// Of a unit in a row on a 16-byte boundary; a lane's loads are as wide.
template <class Format>
constexpr int kLaneAlignment = greatest_power_of_two_in(kUnitBytes<Format>, 16);

template <class Format>
struct LaneBoxRing : BoxRing<Format, kLaneRows> {
  struct Lane {
    int row, exchange, unit;
    __device__ __forceinline__ Lane(const ProductArgs&, int64_t)
        : row(int(threadIdx.x % kLaneRows) * kBoxBytes),
          exchange(int(threadIdx.x % 8) * 16),
          unit(int(threadIdx.x / 32) * kUnitBytes<Format>) {}
    using Row = BoxBytes<kLaneAlignment<Format>, kLaneRows>;
    __device__ __forceinline__ Row rows(const uint8_t* stage) const {
      return {stage + row, uint32_t(exchange), unit, 0};
    }
  };
};

// Those that are as far off an 8-byte boundary in all lanes of a warp.
template <int Alignment>
struct LevelBytes : Bytes<Alignment> {
  using Bytes<Alignment>::Bytes;
};
template <class Row>
constexpr bool is_level = false;
template <int Alignment>
constexpr bool is_level<LevelBytes<Alignment>> = true;

// Rows of a round, or of half of one where that exceeds a box, follow each other an odd number of
// 16-byte pieces apart: then eight of them are read without bank conflicts.
template <class Format>
struct LaneRowRing {
  using Source = CUtensorMap;
  static constexpr int kOldestArch = 900;
  static constexpr int kBoxes = kRoundBytes<Format> + 16 > kMostPlainBoxBytes ? 2 : 1;
  static constexpr int kBoxUnits = kPartials / kBoxes;
  static constexpr int kBytes = kBoxUnits * kUnitBytes<Format>;
  static constexpr int kPitch = (kBytes / 16 | 1) * 16;
  static constexpr int kStageBytes = kBoxes * kLaneRows * kPitch;
  static_assert(kBytes % 16 == 0 && kPitch <= kMostPlainBoxBytes);

  template <class Inputs>
  static int describe(const ProductArgs& args, const Inputs&, Source& source) {
    return describe_plain_boxes(args.weight, row_bytes<Format>(args.ncols), args.nrows, kPitch,
                                kLaneRows, true, source);
  }

  // What a box holds past its units is the next one's; what lies past the matrix is zeros.
  static __device__ __forceinline__ void fetch(const ProductArgs& args, const Source& source,
                                               int64_t first_row, int round, uint8_t* to,
                                               uint64_t* filled) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const int lane = threadIdx.x % 32;
    const bool copies =
        lane < kBoxes && lane * kBytes < int(round_length<Format>(args.ncols, round));
    expect_copies(filled, copies ? kLaneRows * kPitch : 0);
    if (copies) {
      copy_box(to + lane * (kLaneRows * kPitch), &source,
               (round * kRoundBytes<Format> + lane * kBytes) / kPlainElement, int(first_row),
               filled);
    }
#endif
  }

  struct Lane {
    int at;
    __device__ __forceinline__ Lane(const ProductArgs&, int64_t) {
      const int warp = threadIdx.x / 32, row = threadIdx.x % 32;
      at = (warp / kBoxUnits * kLaneRows + row) * kPitch + warp % kBoxUnits * kUnitBytes<Format>;
    }
    using Row = LevelBytes<kLaneAlignment<Format>>;
    __device__ __forceinline__ Row rows(const uint8_t* stage) const { return Row(stage + at); }
  };
};

template <class Format>
using LaneRing =
    std::conditional_t<kUnitBytes<Format> % 8 == 0, LaneBoxRing<Format>, LaneRowRing<Format>>;

// Rows off 16-byte boundaries, which are read word by word. Four lanes share 16 bytes of banks:
// their rows begin at different words of these, where it is not the weight alone that is off.
template <class Format>
struct LaneAnyRing : RowCopies {
  static constexpr int kOldestArch = 900;
  static constexpr int kPitch = (kRoundBytes<Format> + 16 + 127) / 128 * 128;
  static constexpr int kStageBytes = kLaneRows * kPitch + 128;
  static __device__ __forceinline__ int place(int row) { return row * kPitch + row / 4 * 16; }

  static __device__ __forceinline__ void fetch(const ProductArgs& args, const Source&,
                                               int64_t first_row, int round, uint8_t* to,
                                               uint64_t* filled) {
    const int lane = threadIdx.x % 32;
    fetch_rows<Format, false>(args, first_row + lane, true, round, to + place(lane), filled);
  }

  struct Lane {
    int at;
    __device__ __forceinline__ Lane(const ProductArgs& args, int64_t first_row) {
      const int warp = threadIdx.x / 32, row = threadIdx.x % 32;
      at = place(row) + warp * kUnitBytes<Format> + off_boundary<Format>(args, first_row + row);
    }
    using Row = Bytes<Format::kAlignment>;
    __device__ __forceinline__ Row rows(const uint8_t* stage) const { return Row(stage + at); }
  };
};

// What a lane reads past the last row of a stage, and does not use, stays inside the next stage, or
// inside these bytes behind the ring.
constexpr int kRingTail = 128;

}  // namespace bcy
