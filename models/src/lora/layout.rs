//! [`BlockLayout`]: the table from (block, module, A or B) to a place in the flat
//! adapter `[L, d]`, and the adapter that training starts from.
//!
//! A block is `[A | B]` of every adapted module in the order q, k, v, o, gate, up,
//! down, each matrix row-major: A `[r, in]`, B `[out, r]`. Where A is frozen, the A of all
//! blocks come first, then the B of all blocks: what is trained is one range, and it is the
//! update vector `[L, d]`. Where only some layers are adapted, L is their number.

use super::module::Projection;
use crate::decoder::Module;
use crate::decoder::{BlockConfig, DecoderConfig, Family};
use gradtx_kernels::{ops::LoraTarget, rng};
use gradtx_runtime::{Error, Result};
use std::ops::Range;

/// α at most: beyond it, products of 32 bits overflow for ordinary values.
pub(super) const MAX_ALPHA: f64 = 1e6;

/// What is adapted and how.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank r.
    pub rank: usize,
    /// α; products are scaled by α/r.
    pub alpha: f64,
    /// Dropout probability on the adapters' input while training.
    pub dropout: f64,
    /// Adapted modules; order and repetition do not matter.
    pub targets: Vec<Module>,
    /// Adapted layers, as `layers_to_transform` of PEFT; all where it names none. Order and repetition do not matter.
    pub layers: Vec<usize>,
}

/// Largest rank of an adapter.
pub const MAX_RANK: usize = 1024;

impl Default for LoraConfig {
    /// r = 2, α = 32, dropout 0.05, q and v of all layers.
    fn default() -> Self {
        let targets = vec![Module::Q, Module::V];
        Self { rank: 2, alpha: 32.0, dropout: 0.05, targets, layers: vec![] }
    }
}

impl LoraConfig {
    /// α/r.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Modules by their names, e.g. `["q_proj", "v_proj"]`.
    pub fn targets_from_names<S: AsRef<str>>(names: &[S]) -> Result<Vec<Module>> {
        let known = Module::known_names().join(", ");
        let module = |name: &S| {
            let name = name.as_ref();
            Module::from_name(name).ok_or_else(|| {
                Error::invalid(
                    format!("adapter target `{name}`"),
                    format!("not a module of a block; expected one of {known}"),
                )
            })
        };
        names.iter().map(module).collect()
    }

    /// The same for a model, with every target and layer once, in update-vector order, and no layers where these are
    /// all. Targets that the model's family lacks are left out, as PEFT leaves them out.
    fn sorted(&self, model: &DecoderConfig) -> Result<Self> {
        self.check()?;
        let (mut lora, layers) = (self.clone(), model.layers);
        lora.targets = model.family.modules().filter(|module| self.targets.contains(module)).collect();
        if lora.targets.is_empty() {
            let of = |modules: &[Module]| modules.iter().map(|m| m.name()).collect::<Vec<_>>().join(", ");
            let known = model.family.modules().map(|m| model.family.module_name(m)).collect::<Vec<_>>();
            let why = format!(
                "{} are to be adapted, but a model of type {} has {}",
                of(&self.targets),
                model.family.model_type(),
                known.join(", ")
            );
            return Err(Error::invalid("adapter settings", why));
        }
        lora.layers.sort_unstable();
        lora.layers.dedup();
        if let Some(layer) = lora.layers.last().filter(|layer| **layer >= layers) {
            let why = format!("layer {layer} is to be adapted, but the model has {layers}, numbered from 0");
            return Err(Error::invalid("adapter settings", why));
        }
        if lora.layers.len() == layers {
            lora.layers.clear();
        }
        Ok(lora)
    }

    fn check(&self) -> Result<()> {
        let wrong = |what: &str, found: String| {
            Err(Error::invalid("adapter settings", format!("{what}, found {found}")))
        };
        if self.rank == 0 || self.rank > MAX_RANK {
            return wrong(&format!("rank must be between 1 and {MAX_RANK}"), self.rank.to_string());
        }
        if !(self.alpha > 0.0 && self.alpha <= MAX_ALPHA) {
            return wrong(&format!("alpha must be above 0 and at most {MAX_ALPHA}"), self.alpha.to_string());
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong("dropout must be in [0, 1)", self.dropout.to_string());
        }
        if self.targets.is_empty() {
            return wrong("there must be a target module", "none".into());
        }
        Ok(())
    }
}

/// Which of an adapted module's two matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Factor {
    /// `[r, in]`, first applied.
    A,
    /// `[out, r]`.
    B,
}

/// One matrix of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The adapted module.
    pub module: Module,
    /// A or B.
    pub factor: Factor,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// Its elements within a block; where A is frozen, within a block's A or within a block's B.
    pub range: Range<usize>,
}

/// Where every adapter matrix of a model lies.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockLayout {
    family: Family,
    lora: LoraConfig,
    /// The adapted layers of the model, in order.
    layers: Vec<usize>,
    /// Trained values of a block.
    width: usize,
    /// Values of a block's A, where these are frozen; or 0.
    frozen: usize,
    slices: Vec<Slice>,
    /// By layer of the model, then by [`Projection`].
    targets: Vec<[Vec<LoraTarget>; 4]>,
}

impl BlockLayout {
    /// The layout of adapters of this kind on this model.
    pub fn new(model: &DecoderConfig, lora: &LoraConfig) -> Result<Self> {
        Self::of_sorted(model, lora.sorted(model)?, false)
    }

    /// The layout of adapters of which B alone is trained (FFA-LoRA): A stays where it starts.
    pub fn with_frozen_a(model: &DecoderConfig, lora: &LoraConfig) -> Result<Self> {
        Self::of_sorted(model, lora.sorted(model)?, true)
    }

    /// A layout that adapts nothing, so that a pass with it is that of the frozen base alone,
    /// backwards too: what the cost of adapters is measured against.
    pub fn without_targets(model: &DecoderConfig) -> Self {
        let lora = LoraConfig { targets: vec![], ..LoraConfig::default() };
        Self::of_block(model, (0..model.layers).collect(), &model.block(), lora, false)
    }

    fn of_sorted(model: &DecoderConfig, lora: LoraConfig, freeze_a: bool) -> Result<Self> {
        let layers: Vec<usize> = match lora.layers.as_slice() {
            [] => (0..model.layers).collect(),
            some => some.to_vec(),
        };
        let blocks = model.blocks();
        let Some(first) = layers.first().map(|layer| blocks[*layer]) else {
            return Err(Error::invalid("adapter settings", "the model has no layers"));
        };
        for &layer in &layers {
            check_layer(layer, &blocks[layer], &lora, (layers[0], &first))?;
        }
        Ok(Self::of_block(model, layers, &first, lora, freeze_a))
    }

    /// Of a model of which these layers are adapted; those have the shapes of `parts`.
    fn of_block(
        model: &DecoderConfig,
        layers: Vec<usize>,
        parts: &BlockConfig,
        lora: LoraConfig,
        freeze_a: bool,
    ) -> Self {
        let (mut slices, mut width, mut frozen) = (Vec::new(), 0, 0);
        for &module in &lora.targets {
            let (inputs, _) = module.fused().dims(parts);
            let outputs = module.outputs(parts).len();
            for (factor, shape) in [(Factor::A, [lora.rank, inputs]), (Factor::B, [outputs, lora.rank])] {
                let end = if freeze_a && factor == Factor::A { &mut frozen } else { &mut width };
                let range = *end..*end + shape[0] * shape[1];
                *end = range.end;
                slices.push(Slice { module, factor, shape, range });
            }
        }
        let family = model.family;
        let mut layout = Self { family, lora, layers, width, frozen, slices, targets: vec![] };
        let of_block = |block: usize| {
            Projection::ALL.map(|fused| {
                let pairs = layout.slices.chunks_exact(2).filter(|pair| pair[0].module.fused() == fused);
                pairs.map(|pair| layout.target(parts, block, &pair[0], &pair[1])).collect()
            })
        };
        let mut targets = vec![<[Vec<LoraTarget>; 4]>::default(); model.layers];
        for (block, &layer) in layout.layers.iter().enumerate() {
            targets[layer] = of_block(block);
        }
        layout.targets = targets;
        layout
    }

    fn target(&self, parts: &BlockConfig, block: usize, a: &Slice, b: &Slice) -> LoraTarget {
        let outputs = a.module.outputs(parts);
        LoraTarget {
            a_offset: self.range(block, a).start,
            b_offset: self.range(block, b).start,
            out_start: outputs.start,
            out_len: outputs.len(),
            site: (self.layers[block] * Module::ALL.len() + a.module as usize) as u32,
        }
    }

    /// The family of the model, which names its modules.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Rank, scale, dropout and the targets in update-vector order.
    pub fn lora(&self) -> &LoraConfig {
        &self.lora
    }

    /// Names of the targets in model and adapter files.
    pub fn target_names(&self) -> Vec<&'static str> {
        self.lora.targets.iter().map(|target| self.family.module_name(*target)).collect()
    }

    /// Adapted blocks, L: rows of an update vector.
    pub fn blocks(&self) -> usize {
        self.layers.len()
    }

    /// The layers of the model that these blocks are, in order.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// The first layer that is adapted: backward passes end there.
    pub fn first_layer(&self) -> usize {
        self.layers[0]
    }

    /// Trained values per block, d: those of an update vector.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Values of an adapter: L·d, and A where it is frozen.
    pub fn total(&self) -> usize {
        self.blocks() * (self.frozen + self.width)
    }

    /// Shape of so many rows of adapters: `[rows, L, d]`, or where A is frozen `[rows, values]`.
    pub(super) fn rows(&self, rows: usize) -> Vec<usize> {
        match self.freezes_a() {
            true => vec![rows, self.total()],
            false => vec![rows, self.blocks(), self.width],
        }
    }

    /// Whether A stays where it starts, and update vectors are of B alone.
    pub fn freezes_a(&self) -> bool {
        self.frozen > 0
    }

    /// The values of the flat adapter that are trained, `[L, d]`.
    pub fn trained(&self) -> Range<usize> {
        self.blocks() * self.frozen..self.total()
    }

    /// The matrices of a block, in order.
    pub fn slices(&self) -> &[Slice] {
        &self.slices
    }

    /// A matrix's elements in the flat adapter.
    pub fn range(&self, block: usize, slice: &Slice) -> Range<usize> {
        let start = match slice.factor {
            Factor::A if self.freezes_a() => block * self.frozen,
            _ => self.blocks() * self.frozen + block * self.width,
        };
        start + slice.range.start..start + slice.range.end
    }

    /// A matrix's elements in an update vector `[L, d]`; none of a frozen A.
    pub fn range_in_update(&self, block: usize, slice: &Slice) -> Option<Range<usize>> {
        let (range, first) = (self.range(block, slice), self.trained().start);
        (range.start >= first).then(|| range.start - first..range.end - first)
    }

    /// An adapter `[L, d]` of this layout in the order of another one, which has the same matrices but may
    /// freeze A where this one does not, or the other way round.
    ///
    /// # Errors
    /// When they are of other matrices, rank or scale.
    pub fn reordered(&self, values: &[f32], to: &Self) -> Result<Vec<f32>> {
        let (own, other) = (self.kind(), to.kind());
        if own != other || values.len() != self.total() {
            let why = format!("expected {other}; found {own}, {} values", values.len());
            return Err(Error::invalid("adapter", why));
        }
        let mut out = vec![0.0; to.total()];
        for block in 0..self.blocks() {
            for (from, slice) in self.slices.iter().zip(&to.slices) {
                out[to.range(block, slice)].copy_from_slice(&values[self.range(block, from)]);
            }
        }
        Ok(out)
    }

    /// What adapters are of, whether A is trained or not: equal for those that [`Self::reordered`] takes.
    pub fn kind(&self) -> String {
        let LoraConfig { rank, alpha, .. } = &self.lora;
        let targets = self.target_names();
        let (blocks, values) = (self.blocks(), self.total());
        let layers = match self.lora.layers.as_slice() {
            [] => String::new(),
            some => format!(" (layers {})", listed(some)),
        };
        format!(
            "rank {rank}, alpha {alpha}, {}, {blocks} blocks{layers}, {values} values",
            targets.join(", ")
        )
    }

    /// The adapted ranges of one product of one layer of the model.
    pub fn targets(&self, layer: usize, fused: Projection) -> &[LoraTarget] {
        &self.targets[layer][fused as usize]
    }

    /// Name of the layout: 32 hexadecimal digits, equal for equal places and scale.
    ///
    /// Dropout has no part in it: it does not change what an adapter's values mean.
    pub fn hash(&self) -> String {
        let mut text = format!(
            "gradtx block layout 1\nblocks {}\nwidth {}\nrank {}\nalpha {}\n",
            self.blocks(),
            self.width,
            self.lora.rank,
            self.lora.alpha
        );
        if !self.lora.layers.is_empty() {
            text += &format!("layers {} of {}\n", listed(&self.layers), self.targets.len());
        }
        if self.freezes_a() {
            text += "A frozen\n";
        }
        for s in &self.slices {
            text += &format!(
                "{} {:?} {} {} at {}\n",
                self.family.module_name(s.module),
                s.factor,
                s.shape[0],
                s.shape[1],
                s.range.start
            );
        }
        format!("{:032x}", xxhash_rust::xxh3::xxh3_128(text.as_bytes()))
    }
}

/// Numbers of layers for a message.
fn listed(layers: &[usize]) -> String {
    layers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

/// Fails unless a layer can be adapted, and its adapter has the shape of that of the first one.
fn check_layer(
    layer: usize,
    block: &BlockConfig,
    lora: &LoraConfig,
    (first, of_first): (usize, &BlockConfig),
) -> Result<()> {
    let wrong = |why: String| Err(Error::invalid("adapter settings", why));
    let hint = "name the layers of the edge in `layers_to_transform`";
    for &module in &lora.targets {
        let name = module.name();
        let is_factored = |other: &Module| other.rank(&block.attention.ranks) > 0;
        if module.fused().modules(block).any(|other| is_factored(&other)) {
            return wrong(format!(
                "{name} of layer {layer} is compressed and cannot have an adapter; {hint}"
            ));
        }
        let shape = |block: &BlockConfig| (module.fused().dims(block).0, module.outputs(block).len());
        let ((inputs, outputs), (wanted_in, wanted_out)) = (shape(block), shape(of_first));
        if (inputs, outputs) != (wanted_in, wanted_out) {
            return wrong(format!(
                "{name} of layer {layer} has {inputs} inputs and {outputs} outputs, and that of layer {first} has \
                 {wanted_in} and {wanted_out}; adapted layers must have the same shapes; {hint}"
            ));
        }
    }
    Ok(())
}

/// The adapter that training starts from, `[L, d]`: A uniform in ±1/√in, B zero.
///
/// Every matrix has its own key, derived from (key, layer, module), so a module's
/// values do not depend on which other modules and layers are adapted.
pub fn initial_adapter(layout: &BlockLayout, key: u64) -> Vec<f32> {
    let mut values = vec![0.0; layout.total()];
    for (block, &layer) in layout.layers().iter().enumerate() {
        let block_key = rng::derive(key, layer as u64);
        for slice in layout.slices().iter().filter(|s| s.factor == Factor::A) {
            let mut stream = rng::Stream::new(rng::derive(block_key, slice.module as u64));
            let bound = 1.0 / (slice.shape[1] as f64).sqrt();
            for value in &mut values[layout.range(block, slice)] {
                *value = (bound * (2.0 * stream.uniform() - 1.0)) as f32;
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::RopeScaling;

    fn model(hidden: usize, layers: usize, heads: usize, kv_heads: usize) -> DecoderConfig {
        DecoderConfig {
            family: Family::Qwen2,
            vocab: 11,
            hidden,
            intermediate: 24,
            layers,
            heads,
            kv_heads,
            head_dim: hidden / heads,
            norm_eps: 1e-6,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            max_positions: 64,
            window: None,
            tied: true,
            bos: None,
            eos: vec![],
            pad: None,
            emulator: None,
        }
    }

    #[test]
    fn widths_of_published_models() {
        let published = [(896, 24, 14, 2, 5_632), (1536, 28, 12, 2, 9_728), (5120, 64, 40, 8, 32_768)];
        for (hidden, layers, heads, kv, width) in published {
            let layout = BlockLayout::new(&model(hidden, layers, heads, kv), &LoraConfig::default()).unwrap();
            assert_eq!((layout.blocks(), layout.width()), (layers, width));
        }
    }

    #[test]
    fn a_layout_without_targets_adapts_nothing() {
        let model = model(16, 3, 4, 2);
        let layout = BlockLayout::without_targets(&model);
        assert_eq!((layout.blocks(), layout.width(), layout.total()), (3, 0, 0));
        assert!((0..3).all(|block| Projection::ALL.iter().all(|&f| layout.targets(block, f).is_empty())));
        assert!(BlockLayout::new(&model, &LoraConfig { targets: vec![], ..Default::default() }).is_err());
    }

    #[test]
    fn slices_fill_blocks_in_order_for_their_targets() {
        let lora =
            LoraConfig { targets: vec![Module::Down, Module::K, Module::Q, Module::K], ..Default::default() };
        let model = model(16, 3, 4, 2);
        let layout = BlockLayout::new(&model, &lora).unwrap();
        let shapes: Vec<_> = layout.slices().iter().map(|s| (s.module, s.shape)).collect();
        let want = [
            (Module::Q, [2, 16]),
            (Module::Q, [16, 2]),
            (Module::K, [2, 16]),
            (Module::K, [8, 2]),
            (Module::Down, [2, 24]),
            (Module::Down, [16, 2]),
        ];
        assert_eq!(shapes, want);
        let ends: Vec<_> = layout.slices().iter().map(|s| s.range.end).collect();
        assert_eq!(ends, [32, 64, 96, 112, 160, 192]);
        let qkv = layout.targets(2, Projection::Qkv);
        assert_eq!(qkv.len(), 2);
        assert_eq!((qkv[1].a_offset, qkv[1].b_offset), (2 * 192 + 64, 2 * 192 + 96));
        assert_eq!((qkv[1].out_start, qkv[1].out_len, qkv[1].site), (16, 8, 15));
        assert!(layout.targets(0, Projection::O).is_empty());
        assert_eq!(layout.targets(1, Projection::Down).len(), 1);
    }

    #[test]
    fn a_frozen_a_stands_before_what_is_trained() {
        let lora = LoraConfig { targets: vec![Module::Q, Module::V, Module::Down], ..Default::default() };
        let model = model(16, 3, 4, 2);
        let whole = BlockLayout::new(&model, &lora).unwrap();
        let frozen = BlockLayout::with_frozen_a(&model, &lora).unwrap();
        let of_b = 2 * (16 + 8 + 16);
        let of_a = 2 * (16 + 16 + 24);
        assert_eq!(
            (frozen.width(), frozen.total(), whole.total()),
            (of_b, 3 * (of_a + of_b), frozen.total())
        );
        assert_eq!((frozen.trained(), whole.trained()), (3 * of_a..frozen.total(), 0..whole.total()));
        let mut seen = vec![false; frozen.total()];
        for block in 0..3 {
            for slice in frozen.slices() {
                let range = frozen.range(block, slice);
                assert_eq!(slice.factor == Factor::B, range.start >= frozen.trained().start);
                let in_update = frozen.range_in_update(block, slice);
                assert_eq!(in_update.map(|r| r.start + 3 * of_a).unwrap_or(range.start), range.start);
                seen[range].iter_mut().for_each(|seen| assert!(!std::mem::replace(seen, true)));
            }
        }
        assert!(seen.into_iter().all(|seen| seen));
        let v = &frozen.targets(2, Projection::Qkv)[1];
        assert_eq!((v.a_offset, v.b_offset), (2 * of_a + 32, 3 * of_a + 2 * of_b + 32));
        assert_ne!(frozen.hash(), whole.hash());
        // The same adapter in either order, and not another one.
        let start = initial_adapter(&whole, 5);
        assert_eq!(whole.reordered(&start, &frozen).unwrap(), initial_adapter(&frozen, 5));
        assert_eq!(frozen.reordered(&initial_adapter(&frozen, 5), &whole).unwrap(), start);
        let other = BlockLayout::new(&model, &LoraConfig { alpha: 9.0, ..lora }).unwrap();
        let message = whole.reordered(&start, &other).unwrap_err().to_string();
        assert!(message.contains("expected rank 2, alpha 9"), "{message}");
    }

    #[test]
    fn the_hash_names_the_layout_and_stays_the_same() {
        let model = model(16, 3, 4, 2);
        let hash = |lora: &LoraConfig| BlockLayout::new(&model, lora).unwrap().hash();
        let lora = LoraConfig::default();
        assert_eq!(hash(&lora), hash(&LoraConfig { dropout: 0.0, ..lora.clone() }));
        assert_ne!(hash(&lora), hash(&LoraConfig { alpha: 16.0, ..lora.clone() }));
        assert_ne!(hash(&lora), hash(&LoraConfig { rank: 4, ..lora.clone() }));
        assert_ne!(hash(&lora), hash(&LoraConfig { targets: vec![Module::Q], ..lora.clone() }));
        // Files carry this hash: changing it would orphan them.
        assert_eq!(hash(&lora), "ec911d348319d82a60773c6c8139647e");
    }

    #[test]
    fn initial_adapters_depend_on_key_block_and_module() {
        let model = model(16, 3, 4, 2);
        let small = BlockLayout::new(&model, &LoraConfig::default()).unwrap();
        let large =
            BlockLayout::new(&model, &LoraConfig { targets: Module::ALL.to_vec(), ..Default::default() })
                .unwrap();
        let (a, b) = (initial_adapter(&small, 5), initial_adapter(&large, 5));
        let pick = |layout: &BlockLayout, values: &[f32], block, module, factor| {
            let slice = layout.slices().iter().find(|s| s.module == module && s.factor == factor).unwrap();
            values[layout.range(block, slice)].to_vec()
        };
        for block in 0..3 {
            let va = pick(&small, &a, block, Module::V, Factor::A);
            assert_eq!(va, pick(&large, &b, block, Module::V, Factor::A));
            assert!(va.iter().all(|x| x.abs() <= 0.25) && va.iter().any(|x| x.abs() > 0.2));
            assert!(pick(&large, &b, block, Module::Up, Factor::B).iter().all(|&x| x == 0.0));
        }
        assert_ne!(a, initial_adapter(&small, 6));
    }

    #[test]
    fn adapters_of_some_layers_are_those_rows_of_all() {
        let model = model(16, 5, 4, 2);
        let lora = LoraConfig { targets: vec![Module::V, Module::Down], ..Default::default() };
        let all = BlockLayout::new(&model, &lora).unwrap();
        let edge = LoraConfig { layers: vec![4, 0, 3, 0], ..lora.clone() };
        let edge = BlockLayout::new(&model, &edge).unwrap();
        assert_eq!((edge.layers(), edge.blocks(), edge.first_layer()), (&[0, 3, 4][..], 3, 0));
        assert_eq!((edge.width(), edge.total()), (all.width(), 3 * all.width()));
        assert_eq!(edge.rows(2), [2, 3, all.width()]);
        // Values by layer, and dropout masks too.
        let (whole, some) = (initial_adapter(&all, 5), initial_adapter(&edge, 5));
        for (block, layer) in [0, 3, 4].into_iter().enumerate() {
            let row = |values: &[f32], row: usize| values[row * all.width()..][..all.width()].to_vec();
            assert_eq!(row(&some, block), row(&whole, layer));
            let (own, of_all) =
                (edge.targets(layer, Projection::Down)[0], all.targets(layer, Projection::Down)[0]);
            assert_eq!(
                (own.site, own.a_offset),
                (of_all.site, of_all.a_offset - (layer - block) * all.width())
            );
        }
        assert!(edge.targets(1, Projection::Qkv).is_empty() && edge.targets(2, Projection::Down).is_empty());
        assert!(edge.hash() != all.hash() && edge.kind().contains("3 blocks (layers 0, 3, 4)"));
        // All layers by name are all layers.
        let named =
            BlockLayout::new(&model, &LoraConfig { layers: vec![4, 3, 2, 1, 0], ..lora.clone() }).unwrap();
        assert_eq!((named.hash(), &named), (all.hash(), &all));
        let beyond =
            BlockLayout::new(&model, &LoraConfig { layers: vec![5], ..lora }).unwrap_err().to_string();
        assert!(beyond.contains("layer 5 is to be adapted, but the model has 5"), "{beyond}");
    }

    #[test]
    fn impossible_settings_are_errors() {
        let model = model(16, 3, 4, 2);
        let bad = [
            LoraConfig { rank: 0, ..Default::default() },
            LoraConfig { alpha: f64::NAN, ..Default::default() },
            LoraConfig { alpha: -32.0, ..Default::default() },
            LoraConfig { alpha: 1e30, ..Default::default() },
            LoraConfig { dropout: 1.0, ..Default::default() },
            LoraConfig { targets: vec![], ..Default::default() },
        ];
        for lora in bad {
            assert!(BlockLayout::new(&model, &lora).is_err(), "{lora:?}");
        }
        assert!(LoraConfig::targets_from_names(&["q_proj", "query"]).is_err());
    }
}
