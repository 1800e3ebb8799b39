// What warps compute together, shared memory, and asynchronous copies.
#include "internal.h"

namespace emu {

void run_shuffle(void** slots, u32 mask) {
    for (int lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        auto* mine = static_cast<ShuffleSlot*>(slots[lane]);
        if (!(mask >> mine->source & 1)) {
            fail("a shuffle: lane %d reads lane %d, which is not in mask %08x", lane, mine->source, mask);
        }
        mine->result = static_cast<ShuffleSlot*>(slots[mine->source])->value;
    }
}

void run_vote(void** slots, u32 mask) {
    u32 votes = 0;
    for (int lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) votes |= static_cast<VoteSlot*>(slots[lane])->predicate << lane;
    }
    for (int lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) static_cast<VoteSlot*>(slots[lane])->result = votes;
    }
}

// Four 8×8 matrices of 16-bit elements; lanes 8m … 8m+7 give the rows of matrix m. Lane l
// receives elements 2(l%4) and the next of row l/4, or of column l/4 when transposed.
template <bool trans> static void load_matrices(void** slots) {
    for (int m = 0; m < 4; m++) {
        const u16* row[8];
        for (int r = 0; r < 8; r++) {
            row[r] = static_cast<const u16*>(static_cast<LdmatrixSlot*>(slots[m * 8 + r])->row);
        }
        for (int lane = 0; lane < 32; lane++) {
            int g = lane >> 2, q = (lane & 3) * 2;
            u32 low = trans ? row[q][g] : row[g][q], high = trans ? row[q + 1][g] : row[g][q + 1];
            static_cast<LdmatrixSlot*>(slots[lane])->r[m] = low | high << 16;
        }
    }
}
void run_ldmatrix(void** slots, u32) { load_matrices<false>(slots); }
void run_ldmatrix_trans(void** slots, u32) { load_matrices<true>(slots); }

static float low_half(u32 x) { return bits<float>(x << 16); }
static float high_half(u32 x) { return bits<float>(x & 0xffff0000u); }

// d (16×8) += a (16×16) b (16×8), fragments as mma.m16n8k16 lays them out over the lanes.
void run_mma(void** slots, u32) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < 32; lane++) {
        auto* slot = static_cast<MmaSlot*>(slots[lane]);
        int g = lane >> 2, q = (lane & 3) * 2;
        for (int i = 0; i < 4; i++) {
            int row = g + (i & 1) * 8, k = q + (i >> 1) * 8;
            a[row][k] = low_half(slot->a[i]);
            a[row][k + 1] = high_half(slot->a[i]);
        }
        b[q][g] = low_half(slot->b0);
        b[q + 1][g] = high_half(slot->b0);
        b[q + 8][g] = low_half(slot->b1);
        b[q + 9][g] = high_half(slot->b1);
        for (int i = 0; i < 4; i++) c[g + (i >> 1) * 8][q + (i & 1)] = slot->d[i];
    }
    for (int i = 0; i < 16; i++) {
        for (int k = 0; k < 16; k++) {
            for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        auto* slot = static_cast<MmaSlot*>(slots[lane]);
        int g = lane >> 2, q = (lane & 3) * 2;
        for (int i = 0; i < 4; i++) slot->d[i] = c[g + (i >> 1) * 8][q + (i & 1)];
    }
}

void cp_async(void* dst, const void* src, int bytes, bool valid) {
    if ((reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src)) & (bytes - 1)) {
        fail("cp.async: an address is not %d-byte aligned", bytes);
    }
    Fiber& f = worker->fibers[worker->current];
    access(dst, bytes, true);
    if (valid) access(src, bytes, false);
    memset(dst, 0xff, bytes);
    f.copies.push_back({dst, src, bytes, valid, f.group});
}

void cp_commit() { worker->fibers[worker->current].group++; }

// The latest moment at which data may arrive: when the group is waited for.
void cp_wait(int pending) {
    Fiber& f = worker->fibers[worker->current];
    size_t kept = 0;
    for (const PendingCopy& copy : f.copies) {
        if (copy.group >= f.group - pending) {
            f.copies[kept++] = copy;
            continue;
        }
        access(copy.dst, copy.bytes, true);
        if (copy.valid) {
            memcpy(copy.dst, copy.src, copy.bytes);
        } else {
            memset(copy.dst, 0, copy.bytes);
        }
    }
    f.copies.resize(kept);
}

unsigned char* dynamic_shared() { return worker->dynamic; }

void* shared_array(const void* site, size_t bytes) {
    Worker& w = *worker;
    for (const SharedArray& array : w.arrays) {
        if (array.site == site) return w.arena + array.offset;
    }
    // A gap that belongs to nobody lets the race checker see an index beyond the end.
    constexpr size_t GAP = 64;
    size_t offset = (w.arena_used + GAP + 15) / 16 * 16;
    if (offset + bytes > ARENA_BYTES) fail("more than %zu bytes of declared shared memory", ARENA_BYTES);
    w.arrays.push_back({site, offset, bytes});
    w.arena_used = offset + bytes;
    w.declared += (bytes + 15) / 16 * 16;
    w.most_declared = std::max(w.most_declared, w.declared);
    if (w.declared + w.dynamic_bytes > w.most_shared) {
        fail("invalid launch: %zu bytes of shared memory, of which %zu are declared; %zu may be used", w.declared + w.dynamic_bytes,
             w.declared, w.most_shared);
    }
    return w.arena + offset;
}

}  // namespace emu
