// The id index: open-addressing hash tables that lie in a file and are read where they are mapped.
//
// Both tables are arrays of 64-byte buckets, one cache line each, so that a look-up costs one miss (integers) or two (bytes:
// the bucket, then the id itself for the exact comparison). A key lives in its home bucket or, where that one is full, in
// the next that is not; nothing is ever deleted, so a bucket that is not full ends the search. A row is kept as row + 1: a
// zeroed bucket is an empty one. Little-endian machines only. flipkd/vectors/index_reference.py reads and writes the same
// bytes with numpy.
//
// Measured against the alternative for integers (8-byte slots of fingerprint and row, then the ids in row order: two
// misses): keys in the bucket were 1.1 to 1.5 times as fast at 1 M and at 20 M ids, with and without misses.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels/threads.h"

namespace {

constexpr int kIntSlots = 5;
constexpr int kBytesSlots = 4;
constexpr int64_t kAhead = 32;  // look-ups in flight; more than a core can have outstanding misses
constexpr int64_t kRing = 128;  // > 2 * kAhead, a power of two
constexpr uint64_t kAbsent = ~uint64_t{0};      // a null, or a value that the table's key type cannot hold
constexpr uint64_t kSame = ~uint64_t{0} - 1;    // the key of the look-up before: answered from its result
constexpr uint64_t kLongLength = 0xffff;        // lengths from here on are read from the offsets
constexpr uint64_t kPositionMask = (uint64_t{1} << 48) - 1;

struct IntBucket {
  uint64_t key[kIntSlots];
  uint32_t row[kIntSlots];
  uint32_t unused;
};
struct BytesSlot {
  uint32_t tag;
  uint32_t row;
  uint64_t place;  // position in ids.bin | min(length, 0xffff) << 48
};
struct BytesBucket {
  BytesSlot slot[kBytesSlots];
};
static_assert(sizeof(IntBucket) == 64 && sizeof(BytesBucket) == 64, "a bucket is one cache line");

// The finaliser of MurmurHash3 (public domain).
inline uint64_t mix(uint64_t h) {
  h ^= h >> 33;
  h *= 0xff51afd7ed558ccdULL;
  h ^= h >> 33;
  h *= 0xc4ceb9fe1a85ec53ULL;
  return h ^ (h >> 33);
}

// floor(h * buckets / 2^64) for buckets < 2^32, in 64-bit arithmetic.
inline uint64_t home(uint64_t h, uint64_t buckets) {
  return ((h >> 32) * buckets + (((h & 0xffffffffULL) * buckets) >> 32)) >> 32;
}

inline uint64_t load8(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return word;
}
inline uint32_t load4(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

// The last length % 8 bytes as one little-endian word, never reading outside [p, p + length).
inline uint64_t tail_word(const uint8_t* p, uint64_t length) {
  const uint64_t rest = length & 7;
  if (rest == 0) return 0;
  if (length >= 8) return load8(p + length - 8) >> (8 * (8 - rest));
  if (rest >= 4) return load4(p) | static_cast<uint64_t>(load4(p + rest - 4)) << (8 * (rest - 4));
  return p[0] | static_cast<uint64_t>(p[rest >> 1]) << (8 * (rest >> 1)) |
         static_cast<uint64_t>(p[rest - 1]) << (8 * (rest - 1));
}

inline uint64_t hash_bytes(const uint8_t* p, uint64_t length) {
  uint64_t h = length * 0x9e3779b97f4a7c15ULL;
  for (uint64_t at = 0; at + 8 <= length; at += 8) {
    h = (h ^ load8(p + at)) * 0xff51afd7ed558ccdULL;
    h ^= h >> 32;
  }
  return mix((h ^ tail_word(p, length)) * 0xff51afd7ed558ccdULL);
}

inline bool equal_bytes(const uint8_t* a, const uint8_t* b, uint64_t length) {
  if (length < 8) return tail_word(a, length) == tail_word(b, length);
  for (uint64_t at = 0; at + 8 <= length; at += 8)
    if (load8(a + at) != load8(b + at)) return false;
  return load8(a + length - 8) == load8(b + length - 8);
}

inline bool is_valid(const uint8_t* validity, int64_t at) { return (validity[at >> 3] >> (at & 7)) & 1; }

// The key of a value as the table holds it; false where the table's key type cannot hold it.
template <bool kTableUnsigned, typename T>
inline bool as_key(T value, uint64_t* key) {
  *key = static_cast<uint64_t>(value);  // sign-extends signed types
  if constexpr (kTableUnsigned && std::is_signed_v<T>) return value >= 0;
  if constexpr (!kTableUnsigned && std::is_same_v<T, uint64_t>) return value >> 63 == 0;
  return true;
}

// The row number that a slot keeps as row + 1; -1 for 0. In 64 bits: a damaged table may keep what no int32 holds.
template <typename Out>
inline Out row_number(uint32_t kept) {
  return static_cast<Out>(static_cast<int64_t>(kept) - 1);
}

inline uint32_t find_int(const IntBucket* table, uint64_t buckets, uint64_t at, uint64_t key) {
  for (uint64_t seen = 0; seen < buckets; ++seen) {
    const IntBucket& bucket = table[at];
    uint32_t row = 0;
    for (int k = 0; k < kIntSlots; ++k) row |= bucket.key[k] == key ? bucket.row[k] : 0;
    if (row != 0 || bucket.row[kIntSlots - 1] == 0) return row;
    if (++at == buckets) at = 0;
  }
  return 0;
}

template <bool kTableUnsigned, bool kNulls, typename T, typename Out>
void look_up_ints(const T* values, const uint8_t* validity, int64_t validity_offset, int64_t first, int64_t last,
                  const IntBucket* table, uint64_t buckets, Out* out) {
  uint64_t keys[kRing], homes[kRing];
  uint64_t previous = 0;
  bool has_previous = false;
  Out result = -1;
  for (int64_t step = first; step < last + kAhead; ++step) {
    if (step < last) {
      uint64_t key;
      bool present = as_key<kTableUnsigned>(values[step], &key);
      if constexpr (kNulls) present = present && is_valid(validity, validity_offset + step);
      uint64_t at = kAbsent;
      if (present) {
        if (has_previous && key == previous) {
          at = kSame;
        } else {
          at = home(mix(key), buckets);
          __builtin_prefetch(&table[at]);
        }
      }
      has_previous = present;
      previous = key;
      keys[step & (kRing - 1)] = key;
      homes[step & (kRing - 1)] = at;
    }
    const int64_t i = step - kAhead;
    if (i < first) continue;
    const uint64_t at = homes[i & (kRing - 1)];
    if (at < kSame) {
      result = row_number<Out>(find_int(table, buckets, at, keys[i & (kRing - 1)]));
    } else if (at == kAbsent) {
      result = -1;
    }
    out[i] = result;
  }
}

// The ids of a bytes table: id r is data[offsets[r] : offsets[r + 1]].
struct StoredIds {
  const uint8_t* data;
  const uint64_t* offsets;
  uint64_t bytes;
  uint64_t rows;

  // Bounds are checked so that a damaged table reads nothing outside the mapping.
  bool holds(const BytesSlot& slot, const uint8_t* key, uint64_t length) const {
    const uint64_t position = slot.place & kPositionMask;
    if (slot.place >> 48 != std::min(length, kLongLength) || position + length > bytes) return false;
    if (length >= kLongLength &&
        (slot.row > rows || offsets[slot.row] - offsets[slot.row - 1] != length)) return false;
    return equal_bytes(data + position, key, length);
  }
};

inline uint32_t find_bytes(const BytesBucket* table, uint64_t buckets, uint64_t at, uint32_t tag, const StoredIds& ids,
                           const uint8_t* key, uint64_t length) {
  for (uint64_t seen = 0; seen < buckets; ++seen) {
    for (const BytesSlot& slot : table[at].slot) {
      if (slot.row == 0) return 0;
      if (slot.tag == tag && ids.holds(slot, key, length)) return slot.row;
    }
    if (++at == buckets) at = 0;
  }
  return 0;
}

// Keys as Arrow holds them: 4- or 8-byte offsets, or (width 0) all of one length.
template <typename Offset>
struct OffsetKeys {
  const uint8_t* data;
  const Offset* offsets;
  const uint8_t* begin(int64_t i) const { return data + offsets[i]; }
  uint64_t length(int64_t i) const { return static_cast<uint64_t>(offsets[i + 1] - offsets[i]); }
};
struct FixedKeys {
  const uint8_t* data;
  uint64_t stride_bytes;
  const uint8_t* begin(int64_t i) const { return data + static_cast<uint64_t>(i) * stride_bytes; }
  uint64_t length(int64_t) const { return stride_bytes; }
};

template <typename Keys, typename Out>
void look_up_bytes(const Keys& keys, const uint8_t* validity, int64_t validity_offset, int64_t first, int64_t last,
                   const BytesBucket* table, uint64_t buckets, const StoredIds& ids, Out* out) {
  uint64_t homes[kRing];
  uint32_t tags[kRing];
  const BytesSlot* likely[kRing];
  bool has_previous = false;
  Out result = -1;
  for (int64_t step = first; step < last + 2 * kAhead; ++step) {
    if (step < last) {  // stage 1: hash, fetch the bucket
      const int64_t ring = step & (kRing - 1);
      const bool present = validity == nullptr || is_valid(validity, validity_offset + step);
      homes[ring] = kAbsent;
      if (present) {
        const uint8_t* key = keys.begin(step);
        const uint64_t length = keys.length(step);
        if (has_previous && keys.length(step - 1) == length && equal_bytes(keys.begin(step - 1), key, length)) {
          homes[ring] = kSame;
        } else {
          const uint64_t h = hash_bytes(key, length);
          homes[ring] = home(h, buckets);
          tags[ring] = static_cast<uint32_t>(h);
          __builtin_prefetch(&table[homes[ring]]);
        }
      }
      has_previous = present;
    }
    const int64_t middle = step - kAhead;
    if (middle >= first && middle < last) {  // stage 2: fetch the id of the slot that will most likely be the one
      const int64_t ring = middle & (kRing - 1);
      likely[ring] = nullptr;
      if (homes[ring] < kSame) {
        const BytesBucket& bucket = table[homes[ring]];
        unsigned hits = 0;
        for (int k = 0; k < kBytesSlots; ++k)
          hits |= static_cast<unsigned>((bucket.slot[k].tag == tags[ring]) & (bucket.slot[k].row != 0)) << k;
        if (hits != 0) {
          likely[ring] = &bucket.slot[__builtin_ctz(hits)];
          __builtin_prefetch(ids.data + (likely[ring]->place & kPositionMask));
        }
      }
    }
    const int64_t i = step - 2 * kAhead;
    if (i < first) continue;
    const int64_t ring = i & (kRing - 1);
    if (homes[ring] < kSame) {  // stage 3: compare, and walk on only if the guess was wrong
      const BytesSlot* guess = likely[ring];
      const uint8_t* key = keys.begin(i);
      const uint64_t length = keys.length(i);
      const uint32_t row = guess != nullptr && ids.holds(*guess, key, length)
                               ? guess->row
                               : find_bytes(table, buckets, homes[ring], tags[ring], ids, key, length);
      result = row_number<Out>(row);
    } else if (homes[ring] == kAbsent) {
      result = -1;
    }
    out[i] = result;
  }
}

// Calls work(first, last) for parts of [0, count).
template <typename Work>
void in_parts(int64_t count, int32_t threads, const Work& work) {
  constexpr int64_t kWorthAThread = 1 << 15;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, count / kWorthAThread));
  in_threads(parts, [&work, count, parts](int64_t t) { work(count * t / parts, count * (t + 1) / parts); });
}

template <typename T, typename Out>
void look_up_ints_of(const void* values, const uint8_t* validity, int64_t validity_offset, int64_t count,
                     const IntBucket* table, uint64_t buckets, bool table_unsigned, Out* out, int32_t threads) {
  const T* typed = static_cast<const T*>(values);
  in_parts(count, threads, [=](int64_t first, int64_t last) {
    if (table_unsigned) {
      if (validity != nullptr)
        look_up_ints<true, true>(typed, validity, validity_offset, first, last, table, buckets, out);
      else
        look_up_ints<true, false>(typed, validity, validity_offset, first, last, table, buckets, out);
    } else {
      if (validity != nullptr)
        look_up_ints<false, true>(typed, validity, validity_offset, first, last, table, buckets, out);
      else
        look_up_ints<false, false>(typed, validity, validity_offset, first, last, table, buckets, out);
    }
  });
}

template <typename Out>
int32_t look_up_ints_into(const void* values, int32_t width, const uint8_t* validity, int64_t validity_offset,
                          int64_t count, const IntBucket* table, uint64_t buckets, bool table_unsigned, Out* out,
                          int32_t threads) {
  const auto go = [&](auto tag) {
    look_up_ints_of<decltype(tag)>(values, validity, validity_offset, count, table, buckets, table_unsigned, out, threads);
    return 0;
  };
  switch (width) {
    case 1: return go(uint8_t{});
    case 2: return go(uint16_t{});
    case 4: return go(uint32_t{});
    case 8: return go(uint64_t{});
    case -1: return go(int8_t{});
    case -2: return go(int16_t{});
    case -4: return go(int32_t{});
    case -8: return go(int64_t{});
    default: return 1;
  }
}

template <typename Out>
int32_t look_up_bytes_into(const uint8_t* data, const void* offsets, int32_t width, uint64_t stride_bytes,
                           const uint8_t* validity, int64_t validity_offset, int64_t count, const BytesBucket* table,
                           uint64_t buckets, const StoredIds& ids, Out* out, int32_t threads) {
  const auto go = [&](const auto& keys) {
    in_parts(count, threads, [&](int64_t first, int64_t last) {
      look_up_bytes(keys, validity, validity_offset, first, last, table, buckets, ids, out);
    });
    return 0;
  };
  switch (width) {
    case 0: return go(FixedKeys{data, stride_bytes});
    case 4: return go(OffsetKeys<int32_t>{data, static_cast<const int32_t*>(offsets)});
    case 8: return go(OffsetKeys<int64_t>{data, static_cast<const int64_t*>(offsets)});
    default: return 1;
  }
}

// Inserts rows [first, last), row r under hash(r), unless find() knows its key already: then (first row, r) goes to
// duplicates. Stops early when `capacity` pairs are full. Returns the next row to insert.
template <typename Hash, typename Insert>
int64_t build(const uint8_t* status, uint8_t skip_mask, int64_t first, int64_t last, uint64_t buckets, const void* table,
              int64_t* duplicates, int64_t capacity, int64_t* found, const Hash& hash, const Insert& insert) {
  uint64_t hashes[kRing];
  *found = 0;
  for (int64_t step = first; step < last + kAhead; ++step) {
    if (step < last) {
      const uint64_t h = hash(step);
      hashes[step & (kRing - 1)] = h;
      __builtin_prefetch(static_cast<const char*>(table) + home(h, buckets) * 64, 1);
    }
    const int64_t row = step - kAhead;
    if (row < first) continue;
    if (*found == capacity) return row;
    if (status[row] & skip_mask) continue;
    const uint64_t h = hashes[row & (kRing - 1)];
    const uint32_t known = insert(row, h, home(h, buckets));
    if (known != 0) {
      duplicates[2 * *found] = static_cast<int64_t>(known) - 1;
      duplicates[2 * *found + 1] = row;
      ++*found;
    }
  }
  return last;
}

}  // namespace

extern "C" {

// width: bytes per value, negative for signed types. out: int32 or int64 by out_bytes, [count], -1 where not found.
// Returns 0, or 1 for a width it does not know.
int32_t flipkd_index_look_up_ints(const void* values, int32_t width, const uint8_t* validity, int64_t validity_offset,
                                  int64_t count, const void* table, uint64_t buckets, int32_t table_unsigned, void* out,
                                  int32_t out_bytes, int32_t threads) {
  const IntBucket* typed = static_cast<const IntBucket*>(table);
  if (out_bytes == 4)
    return look_up_ints_into(values, width, validity, validity_offset, count, typed, buckets, table_unsigned != 0,
                             static_cast<int32_t*>(out), threads);
  return look_up_ints_into(values, width, validity, validity_offset, count, typed, buckets, table_unsigned != 0,
                           static_cast<int64_t*>(out), threads);
}

// width: bytes per offset (4, 8), or 0 for keys of stride_bytes each. id_*: the stored ids, as StoredIds says.
int32_t flipkd_index_look_up_bytes(const uint8_t* data, const void* offsets, int32_t width, uint64_t stride_bytes,
                                   const uint8_t* validity, int64_t validity_offset, int64_t count, const void* table,
                                   uint64_t buckets, const uint8_t* id_data, const uint64_t* id_offsets, uint64_t id_bytes,
                                   uint64_t rows, void* out, int32_t out_bytes, int32_t threads) {
  const BytesBucket* typed = static_cast<const BytesBucket*>(table);
  const StoredIds ids{id_data, id_offsets, id_bytes, rows};
  if (out_bytes == 4)
    return look_up_bytes_into(data, offsets, width, stride_bytes, validity, validity_offset, count, typed, buckets, ids,
                              static_cast<int32_t*>(out), threads);
  return look_up_bytes_into(data, offsets, width, stride_bytes, validity, validity_offset, count, typed, buckets, ids,
                            static_cast<int64_t*>(out), threads);
}

// Rows whose status has a bit of skip_mask are not indexed. duplicates: [capacity, 2]; *found of them are written.
// The table must have more slots than rows.
int64_t flipkd_index_build_ints(const uint64_t* keys, const uint8_t* status, uint8_t skip_mask, int64_t first,
                                int64_t last, void* table, uint64_t buckets, int64_t* duplicates, int64_t capacity,
                                int64_t* found) {
  IntBucket* typed = static_cast<IntBucket*>(table);
  return build(
      status, skip_mask, first, last, buckets, table, duplicates, capacity, found,
      [=](int64_t row) { return mix(keys[row]); },
      [=](int64_t row, uint64_t, uint64_t at) -> uint32_t {
        for (;; at = at + 1 == buckets ? 0 : at + 1) {
          IntBucket& bucket = typed[at];
          for (int k = 0; k < kIntSlots; ++k) {
            if (bucket.row[k] == 0) {
              bucket.key[k] = keys[row];
              bucket.row[k] = static_cast<uint32_t>(row + 1);
              return 0;
            }
            if (bucket.key[k] == keys[row]) return bucket.row[k];
          }
        }
      });
}

int64_t flipkd_index_build_bytes(const uint8_t* data, const uint64_t* offsets, uint64_t id_bytes, uint64_t rows,
                                 const uint8_t* status, uint8_t skip_mask, int64_t first, int64_t last, void* table,
                                 uint64_t buckets, int64_t* duplicates, int64_t capacity, int64_t* found) {
  BytesBucket* typed = static_cast<BytesBucket*>(table);
  const StoredIds ids{data, offsets, id_bytes, rows};
  return build(
      status, skip_mask, first, last, buckets, table, duplicates, capacity, found,
      [=](int64_t row) { return hash_bytes(data + offsets[row], offsets[row + 1] - offsets[row]); },
      [=](int64_t row, uint64_t h, uint64_t at) -> uint32_t {
        const uint64_t length = offsets[row + 1] - offsets[row];
        for (;; at = at + 1 == buckets ? 0 : at + 1) {
          for (BytesSlot& slot : typed[at].slot) {
            if (slot.row == 0) {
              slot = {static_cast<uint32_t>(h), static_cast<uint32_t>(row + 1),
                      offsets[row] | std::min(length, kLongLength) << 48};
              return 0;
            }
            if (slot.tag == static_cast<uint32_t>(h) && ids.holds(slot, data + offsets[row], length)) return slot.row;
          }
        }
      });
}

}  // extern "C"
