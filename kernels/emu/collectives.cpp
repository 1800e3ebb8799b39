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

// An element of an operand in shared memory: row `r` of 128 bytes and column `c`, as gpu.cuh's WgmmaTile has them.
static float element(const WgmmaTile& tile, int r, int c) {
    u64 place = reinterpret_cast<u64>(tile.begin) + c / 64 * tile.panel + r * 128 + c % 64 * 2;
    place ^= (place >> 7 & 7) << 4;
    u16 value;
    memcpy(&value, reinterpret_cast<const void*>(place), sizeof value);
    return bits<float>((u32)value << 16);
}

struct WgmmaSlot { const PendingProduct* pending; int warp; };

static void run_wgmma(void** slots, u32) {
    const Wgmma& first = static_cast<WgmmaSlot*>(slots[0])->pending->product;
    float a[16][16];
    std::vector<float> b(16 * first.n);
    for (int lane = 0; lane < 32; lane++) {
        auto* slot = static_cast<WgmmaSlot*>(slots[lane]);
        const Wgmma& mine = slot->pending->product;
        if (mine.n != first.n || mine.b.begin != first.b.begin || mine.a_tile.begin != first.a_tile.begin) {
            fail("wgmma: lanes of a warp multiply different tiles");
        }
        int g = lane >> 2, q = (lane & 3) * 2;
        for (int i = 0; i < 4; i++) {
            int row = g + (i & 1) * 8, k = q + (i >> 1) * 8;
            for (int next = 0; next < 2; next++) {
                float& to = a[row][k + next];
                if (mine.a_in_registers) {
                    to = next ? high_half(mine.a[i]) : low_half(mine.a[i]);
                } else {
                    to = element(mine.a_tile, slot->warp % 4 * 16 + row, k + next);
                }
            }
        }
    }
    for (int k = 0; k < 16; k++) {
        for (int j = 0; j < first.n; j++) {
            b[k * first.n + j] = first.b_transposed ? element(first.b, j, k) : element(first.b, k, j);
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        auto* slot = static_cast<WgmmaSlot*>(slots[lane]);
        float* d = slot->pending->product.d;
        int g = lane >> 2, q = (lane & 3) * 2;
        for (int i = 0; i < first.n / 2; i++) {
            int row = g + (i >> 1 & 1) * 8, column = i / 4 * 8 + q + (i & 1);
            for (int k = 0; k < 16; k++) d[i] += a[row][k] * b[k * first.n + column];
        }
    }
}

void wgmma(const Wgmma& product) {
    Fiber& f = worker->fibers[worker->current];
    for (const WgmmaTile& tile : {product.a_tile, product.b}) {
        if (reinterpret_cast<uintptr_t>(tile.begin) & 15) fail("wgmma: an operand is not 16-byte aligned");
    }
    PendingProduct pending{product, {}, f.product_group};
    int values = product.n / 2;
    bool begun = false;
    for (const PendingProduct& other : f.products) begun |= other.product.d == product.d;
    if (begun && !product.add) fail("wgmma: a product overwrites one that nobody has waited for");
    if (!begun) {
        pending.before.assign(values, 0.f);
        if (product.add) std::copy(product.d, product.d + values, pending.before.begin());
        std::fill(product.d, product.d + values, NAN);
    }
    f.products.push_back(pending);
}

void wgmma_commit() { worker->fibers[worker->current].product_group++; }

// The latest moment at which products may read shared memory and write their results.
void wgmma_wait(int pending) {
    Fiber& f = worker->fibers[worker->current];
    size_t done = 0;
    while (done < f.products.size() && f.products[done].group < f.product_group - pending) done++;
    for (size_t i = 0; i < done; i++) {
        const PendingProduct& each = f.products[i];
        const Wgmma& product = each.product;
        std::copy(each.before.begin(), each.before.end(), product.d);
        // What a lane reads for its warp, for the race checker: rows of the tiles.
        auto note = [&](const WgmmaTile& tile, int rows, int columns) {
            for (int r = f.lane; r < rows; r += 32) {
                for (int c = 0; c < columns; c += 8) {
                    u64 place = reinterpret_cast<u64>(tile.begin) + c / 64 * tile.panel + r * 128 + c % 64 * 2;
                    access(reinterpret_cast<const void*>(place ^ (place >> 7 & 7) << 4), 16, false);
                }
            }
        };
        if (!product.a_in_registers) note(product.a_tile, 64, 16);
        note(product.b, product.b_transposed ? product.n : 16, product.b_transposed ? 16 : product.n);
        WgmmaSlot slot{&each, f.warp};
        collective(Op::wgmma, 0xffffffffu, &slot, run_wgmma);
    }
    f.products.erase(f.products.begin(), f.products.begin() + done);
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
