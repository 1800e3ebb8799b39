//! How many warps of a kernel a multiprocessor holds.

/// A launch at the shapes that `bench kernels` measures by default on a GPU, which are those of Qwen2.5-7B and Flan-T5-Large.
pub struct Launch {
    pub module: &'static str,
    /// The kernel, in bf16 where there are several.
    pub kernel: &'static str,
    pub threads: u32,
    /// Bytes of shared memory that the launch adds to what is declared.
    pub shared: u32,
}

impl Launch {
    /// Kernels of Hopper's own instructions are empty elsewhere.
    pub fn runs_on(&self, architecture: &str) -> bool {
        self.module != "flash_hopper" || architecture.starts_with("sm_9")
    }
}

const fn launch(module: &'static str, kernel: &'static str, threads: u32, shared: u32) -> Launch {
    Launch { module, kernel, threads, shared }
}

/// Kernels in which the time of a step goes, with the threads and the shared memory that `kernels/src/cuda` launches them with.
pub const HOT: &[Launch] = &[
    launch("activation", "gelu_dropout_backward_bf16", 256, 0),
    launch("activation", "gelu_dropout_forward_bf16", 256, 0),
    launch("activation", "silu_backward_bf16", 256, 0),
    launch("activation", "silu_forward_bf16", 256, 0),
    launch("adamw", "adamw_bf16", 256, 0),
    launch("adamw", "sum_squares_partial", 256, 0),
    // Keys and values of four warps, two stages each.
    launch("decode", "attention_decode_tiles_128", 128, 69_632),
    // Rows of the block's queries, and of two stages of keys and values.
    launch("flash", "flash_backward_128", 128, 70_656),
    launch("flash", "flash_backward_64", 128, 74_752),
    launch("flash", "flash_forward_128", 128, 69_632),
    launch("flash", "flash_forward_128_ahead", 128, 104_448),
    launch("flash", "flash_forward_64", 128, 55_296),
    // Tiles of 64 rows: six; two and two stages of two.
    launch("flash_hopper", "flash_hopper_backward", 128, 101_376),
    launch("flash_hopper", "flash_hopper_forward", 128, 99_328),
    // Three stages of 32 of the summed dimension.
    launch("gemm", "gemm_nn_128_bf16", 256, 56_832),
    launch("gemm", "gemm_nn_64_bf16", 128, 29_184),
    launch("gemm", "gemm_nt_128_bf16", 256, 61_440),
    launch("gemm", "gemm_nt_64_bf16", 128, 30_720),
    launch("gemm", "gemm_tn_128_bf16_f32", 256, 52_224),
    launch("gemm", "gemm_tn_64_bf16_f32", 128, 27_648),
    // Three steps of two rows on their way.
    launch("lora_rows", "rmsnorm_lora_backward_pair_bf16", 448, 129_024),
    launch("lora_rows", "rmsnorm_lora_forward_bf16", 64, 0),
    launch("rmsnorm", "rmsnorm_backward_bf16", 448, 0),
    launch("rmsnorm", "rmsnorm_forward_bf16", 448, 0),
    // Queries, keys, values and probabilities of a head: 36 and 28 blocks.
    launch("t5_tiles", "t5_attention_backward_32", 64, 31_744),
    launch("t5_tiles", "t5_attention_backward_48", 96, 50_688),
    launch("t5_tiles", "t5_attention_forward_32", 64, 13_952),
    launch("t5_tiles", "t5_attention_forward_48", 96, 20_864),
];

/// What a multiprocessor of both architectures has: registers, threads, and blocks at most.
const REGISTERS: u32 = 65_536;
const WARPS: u32 = 64;
const BLOCKS: u32 = 32;
/// Registers are given to a warp by so many, shared memory to a block by so many bytes; a block takes 1 KiB more of it.
const REGISTER_UNIT: u32 = 256;
const SHARED_UNIT: u32 = 128;
const RESERVED: u32 = 1024;

/// Bytes of shared memory of a multiprocessor: A100, H100.
pub fn shared_of(architecture: &str) -> u32 {
    if architecture.starts_with("sm_9") { 228 << 10 } else { 164 << 10 }
}

/// Blocks that a multiprocessor holds at once of a kernel with so many registers per thread and bytes of declared shared memory; and
/// the percentage of the warps that it can hold.
pub fn occupancy(launch: &Launch, registers: u32, declared: u32, architecture: &str) -> (u32, u32) {
    let warps = launch.threads.div_ceil(32);
    let of_warp = (registers * 32).next_multiple_of(REGISTER_UNIT);
    let by_registers = REGISTERS / (of_warp * warps).max(1);
    let of_block = (launch.shared + declared + RESERVED).next_multiple_of(SHARED_UNIT);
    let blocks = by_registers.min(shared_of(architecture) / of_block).min(WARPS / warps).min(BLOCKS);
    (blocks, 100 * blocks * warps / WARPS)
}
