// A stand-in for libcublasLt.so: the part of its interface that gradtx calls, on the memory of the
// stand-in driver. A product is computed the plain way from what the descriptors say, column by
// column as the real library sees it, and is refused where they contradict each other: a product
// must be run with the very descriptors, alignments and workspace that its algorithm was asked for.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <memory>

#define API extern "C" __attribute__((visibility("default")))

// The stand-in driver's (streams.cpp, memory.cpp).
extern "C" int emu_enqueue(void* stream, int (*run)(void*), void (*drop)(void*), void* argument);
extern "C" int emu_is_allocated(const void* p, size_t bytes);

namespace {

enum Status : int { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum Type : int { F32 = 0, BF16 = 14 };
constexpr int COMPUTE_F32 = 68;
constexpr uint32_t EPILOGUE_NONE = 1, EPILOGUE_BIAS = 4, REDUCE_IN_COMPUTE_TYPE = 2;

// Column-major: column c begins at c · ld.
struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t ld;
};
struct Desc {
    int compute, scale;
    int transposed[2] = {0, 0};
    uint32_t epilogue = EPILOGUE_NONE;
    uint64_t bias = 0;
};
struct Preference {
    uint64_t workspace = 0;
    uint32_t reductions = ~0u;
    uint32_t alignments[4] = {256, 256, 256, 256};
};
// What a heuristic was asked; the algorithm is its hash and the alignments.
struct Algorithm {
    uint64_t asked;
    uint64_t workspace;
    uint32_t alignments[4];
    uint64_t bias_alignment;  // of the address in the descriptor, when it was asked
    uint64_t unused[3];
};
static_assert(sizeof(Algorithm) == 64, "as the library's");
struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

uint64_t mix(uint64_t hash, uint64_t value) { return (hash ^ value) * 0x9e3779b97f4a7c15ull ^ hash >> 29; }

uint64_t fingerprint(const Desc& d, const Layout* const (&layouts)[4]) {
    uint64_t hash = mix(mix(mix(d.compute, d.transposed[0]), d.transposed[1]), d.epilogue);
    for (const Layout* l : layouts) hash = mix(mix(mix(mix(hash, l->type), l->rows), l->cols), l->ld);
    return hash;
}

size_t size_of(int type) { return type == BF16 ? 2 : 4; }

double get(const Layout& l, uint64_t p, uint64_t row, uint64_t col) {
    uint64_t at = col * l.ld + row;
    if (l.type == F32) return reinterpret_cast<const float*>(p)[at];
    uint32_t bits = (uint32_t)reinterpret_cast<const uint16_t*>(p)[at] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
void put(const Layout& l, uint64_t p, uint64_t row, uint64_t col, float value) {
    uint64_t at = col * l.ld + row;
    if (l.type == F32) {
        reinterpret_cast<float*>(p)[at] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bool nan = value != value;
    reinterpret_cast<uint16_t*>(p)[at] = nan ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
bool is_allocated(const Layout& l, uint64_t p) {
    size_t elements = (l.cols - 1) * l.ld + l.rows;
    return emu_is_allocated(reinterpret_cast<const void*>(p), elements * size_of(l.type));
}

struct Product {
    Desc desc;
    Layout a, b, c, d;
    uint64_t pa, pb, pc, pd;
    float alpha, beta;
};

int run(void* argument) {
    const Product& p = *static_cast<const Product*>(argument);
    constexpr int LAUNCH_FAILED = 719;
    bool reads_c = p.beta != 0.f, has_bias = p.desc.epilogue == EPILOGUE_BIAS;
    Layout bias{p.d.type, p.d.rows, 1, (int64_t)p.d.rows};
    if (!is_allocated(p.a, p.pa) || !is_allocated(p.b, p.pb) || !is_allocated(p.d, p.pd) ||
        (reads_c && !is_allocated(p.c, p.pc)) || (has_bias && !is_allocated(bias, p.desc.bias))) {
        fprintf(stderr, "emulated cuBLASLt: a matrix lies outside of every allocation\n");
        return LAUNCH_FAILED;
    }
    uint64_t depth = p.desc.transposed[0] ? p.a.rows : p.a.cols;
    for (uint64_t col = 0; col < p.d.cols; col++) {
        for (uint64_t row = 0; row < p.d.rows; row++) {
            double sum = 0;
            for (uint64_t k = 0; k < depth; k++) {
                double x = p.desc.transposed[0] ? get(p.a, p.pa, k, row) : get(p.a, p.pa, row, k);
                double y = p.desc.transposed[1] ? get(p.b, p.pb, col, k) : get(p.b, p.pb, k, col);
                sum += x * y;
            }
            double value = p.alpha * sum;
            if (reads_c) value += p.beta * get(p.c, p.pc, row, col);
            if (has_bias) value += get(bias, p.desc.bias, row, 0);
            put(p.d, p.pd, row, col, (float)value);
        }
    }
    return 0;
}
void drop(void* argument) { delete static_cast<Product*>(argument); }

// Whether the matrices fit each other.
bool fit(const Desc& d, const Layout* const (&layouts)[4]) {
    const Layout &a = *layouts[0], &b = *layouts[1], &c = *layouts[2], &out = *layouts[3];
    for (const Layout* l : layouts) {
        if (l->rows == 0 || l->cols == 0 || l->ld < (int64_t)l->rows) return false;
    }
    uint64_t m = d.transposed[0] ? a.cols : a.rows, k = d.transposed[0] ? a.rows : a.cols;
    uint64_t n = d.transposed[1] ? b.rows : b.cols, k_too = d.transposed[1] ? b.cols : b.rows;
    return k == k_too && out.rows == m && out.cols == n && c.rows == m && c.cols == n && a.type == b.type &&
           c.type == out.type && (a.type == BF16 || out.type == F32);
}

Status take(void* to, size_t size, const void* from, size_t given) {
    if (size != given) return INVALID_VALUE;
    memcpy(to, from, size);
    return SUCCESS;
}

}  // namespace

API size_t cublasLtGetVersion() { return 120405; }
// As a library that is too new for the driver, which loads and does not start: a copy in a directory `too-new`.
API int cublasLtCreate(void** handle) {
    constexpr int NOT_INITIALIZED = 1;
    Dl_info here;
    if (dladdr(reinterpret_cast<void*>(&cublasLtCreate), &here) && strstr(here.dli_fname, "/too-new/")) return NOT_INITIALIZED;
    *handle = new char;
    return SUCCESS;
}
API int cublasLtDestroy(void* handle) {
    delete static_cast<char*>(handle);
    return SUCCESS;
}
API int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    if (type != F32 && type != BF16) return INVALID_VALUE;
    *layout = new Layout{type, rows, cols, ld};
    return SUCCESS;
}
API int cublasLtMatrixLayoutDestroy(void* layout) {
    delete static_cast<Layout*>(layout);
    return SUCCESS;
}
API int cublasLtMatmulDescCreate(void** desc, int compute, int scale) {
    if (compute != COMPUTE_F32 || scale != F32) return INVALID_VALUE;
    *desc = new Desc{compute, scale};
    return SUCCESS;
}
API int cublasLtMatmulDescDestroy(void* desc) {
    delete static_cast<Desc*>(desc);
    return SUCCESS;
}
API int cublasLtMatmulDescSetAttribute(void* desc, int attribute, const void* value, size_t size) {
    auto* d = static_cast<Desc*>(desc);
    switch (attribute) {
        case 3: return take(&d->transposed[0], sizeof(int), value, size);
        case 4: return take(&d->transposed[1], sizeof(int), value, size);
        case 7: return take(&d->epilogue, sizeof d->epilogue, value, size);
        case 8: return take(&d->bias, sizeof d->bias, value, size);
        default: return INVALID_VALUE;
    }
}
API int cublasLtMatmulPreferenceCreate(void** preference) {
    *preference = new Preference;
    return SUCCESS;
}
API int cublasLtMatmulPreferenceDestroy(void* preference) {
    delete static_cast<Preference*>(preference);
    return SUCCESS;
}
API int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t size) {
    auto* p = static_cast<Preference*>(preference);
    if (attribute == 1) return take(&p->workspace, sizeof p->workspace, value, size);
    if (attribute == 3) return take(&p->reductions, sizeof p->reductions, value, size);
    if (attribute < 5 || attribute > 8) return INVALID_VALUE;
    return take(&p->alignments[attribute - 5], sizeof(uint32_t), value, size);
}
// There is nothing for 16-bit matrices whose columns begin at odd elements: the real library knows
// such cases too, and they go to another kernel.
API int cublasLtMatmulAlgoGetHeuristic(void*, void* desc, void* a, void* b, void* c, void* d, void* preference,
                                       int wanted, Heuristic* found, int* count) {
    auto& how = *static_cast<Desc*>(desc);
    auto& wish = *static_cast<Preference*>(preference);
    const Layout* const layouts[4] = {static_cast<Layout*>(a), static_cast<Layout*>(b), static_cast<Layout*>(c),
                                      static_cast<Layout*>(d)};
    *count = 0;
    if (wanted < 1 || !fit(how, layouts) || wish.reductions != REDUCE_IN_COMPUTE_TYPE) return INVALID_VALUE;
    for (int i = 0; i < 4; i++) {
        bool odd = layouts[i]->type == BF16 && (layouts[i]->ld % 2 || wish.alignments[i] < 4);
        if (odd) return NOT_SUPPORTED;
    }
    memset(found, 0, sizeof *found);
    found->algorithm.asked = fingerprint(how, layouts);
    memcpy(found->algorithm.alignments, wish.alignments, sizeof wish.alignments);
    found->algorithm.bias_alignment = how.bias ? how.bias & -how.bias : 0;
    if (found->algorithm.bias_alignment > 256) found->algorithm.bias_alignment = 256;
    found->algorithm.workspace = found->workspace = wish.workspace / 2;
    found->waves = 1.f;
    // Another one, which happens to be the same.
    if (wanted > 1) found[1] = found[0];
    *count = wanted > 1 ? 2 : 1;
    return SUCCESS;
}
API int cublasLtMatmul(void*, void* desc, const void* alpha, uint64_t a, void* la, uint64_t b, void* lb,
                       const void* beta, uint64_t c, void* lc, uint64_t d, void* ld, const Algorithm* algorithm,
                       uint64_t workspace, size_t workspace_bytes, void* stream) {
    const Layout* const layouts[4] = {static_cast<Layout*>(la), static_cast<Layout*>(lb), static_cast<Layout*>(lc),
                                      static_cast<Layout*>(ld)};
    auto& how = *static_cast<Desc*>(desc);
    const uint64_t addresses[4] = {a, b, c, d};
    bool promised = fingerprint(how, layouts) == algorithm->asked && workspace_bytes >= algorithm->workspace;
    for (int i = 0; i < 4; i++) promised &= addresses[i] % algorithm->alignments[i] == 0;
    if (how.epilogue == EPILOGUE_BIAS) promised &= how.bias % algorithm->bias_alignment == 0;
    // C may be D, but then it must be laid out like it.
    promised &= c != d || layouts[2]->ld == layouts[3]->ld;
    promised &= emu_is_allocated(reinterpret_cast<const void*>(workspace), workspace_bytes) != 0;
    if (!promised) return INVALID_VALUE;
    auto* product = new Product{how, *layouts[0], *layouts[1], *layouts[2], *layouts[3], a, b, c, d, 0, 0};
    memcpy(&product->alpha, alpha, sizeof(float));
    memcpy(&product->beta, beta, sizeof(float));
    return emu_enqueue(stream, run, drop, product) == 0 ? SUCCESS : EXECUTION_FAILED;
}
