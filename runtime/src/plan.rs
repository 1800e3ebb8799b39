//! [`MemoryPlan`]: every buffer's shape and bytes, known and shown before step 0.
//!
//! A job that will not fit should say so in its first second, not at its first long
//! example.

use crate::{Error, Result};
use std::fmt;
use std::path::{Path, PathBuf};

/// What a buffer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Values that are not trained.
    Frozen,
    /// Values that are trained, and their master copies.
    Trained,
    /// Gradients.
    Gradients,
    /// Optimizer state.
    Optimizer,
    /// What forward keeps for backward.
    Activations,
    /// What an operation needs while it runs.
    Scratch,
    /// Tokens, labels and update vectors on their way in.
    Batch,
    /// Keys and values of generated text.
    Cache,
}

impl Purpose {
    fn name(self) -> &'static str {
        match self {
            Self::Frozen => "frozen values",
            Self::Trained => "trained values",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::Activations => "activations",
            Self::Scratch => "scratch",
            Self::Batch => "batch",
            Self::Cache => "cache",
        }
    }
}

/// One buffer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Planned {
    /// What it is for.
    pub purpose: Purpose,
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub bytes: u64,
    /// Pieces of memory that it consists of, of the same size.
    #[serde(skip)]
    pub pieces: usize,
}

impl Planned {
    /// The shape of each piece.
    fn piece(&self) -> &[usize] {
        if self.pieces > 1 { &self.shape[1..] } else { &self.shape }
    }
}

/// Memory that a plan must fit into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// So many bytes of main memory.
    Host(u64),
    /// The memory of a device, of which so many bytes are free. It is given out in pages, and libraries take
    /// part of it later: code of kernels that is loaded when it is first used, graphs, and, where ranks exchange
    /// values between devices, their buffers.
    Device {
        /// Bytes that nobody has.
        free: u64,
        /// Whether ranks exchange values between devices.
        group: bool,
    },
}

impl From<u64> for Room {
    fn from(bytes: u64) -> Self {
        Self::Host(bytes)
    }
}

impl Room {
    /// A device's memory is given out in pieces of so many bytes.
    const PAGE: u64 = 2 << 20;
    /// Smaller buffers share pages, in units of [`Self::UNIT`].
    const SMALL: u64 = 1 << 20;
    const UNIT: u64 = 512;
    /// Left for libraries and for what no plan knows, beside a share of what is free.
    const MARGIN: u64 = 1 << 30;
    const MARGIN_SHARE: u64 = 32;
    /// Left for the buffers of NCCL.
    const GROUP: u64 = 3 << 29;

    /// Bytes that the buffers of a plan can have.
    pub fn available(self) -> u64 {
        match self {
            Self::Host(bytes) => bytes,
            Self::Device { free, group } => {
                let margin = free / Self::MARGIN_SHARE + Self::MARGIN + if group { Self::GROUP } else { 0 };
                free.saturating_sub(margin)
            }
        }
    }

    /// Bytes of this memory that a plan takes.
    pub fn taken(self, plan: &MemoryPlan) -> u64 {
        if let Self::Host(_) = self {
            return plan.total();
        }
        let (mut pages, mut small) = (0u64, 0u64);
        for Planned { bytes, pieces, .. } in &plan.entries {
            let pieces = *pieces as u64;
            let each = bytes.div_ceil(pieces.max(1));
            let (sum, unit) =
                if each < Self::SMALL { (&mut small, Self::UNIT) } else { (&mut pages, Self::PAGE) };
            *sum = sum.saturating_add(each.div_ceil(unit).saturating_mul(unit).saturating_mul(pieces));
        }
        pages.saturating_add(small.div_ceil(Self::PAGE).saturating_mul(Self::PAGE))
    }

    /// Whether a plan fits.
    pub fn holds(self, plan: &MemoryPlan) -> bool {
        self.taken(plan) <= self.available()
    }
}

/// All buffers of a job.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryPlan {
    entries: Vec<Planned>,
}

impl MemoryPlan {
    /// A plan without buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a buffer of elements of `size` bytes.
    pub fn add(&mut self, purpose: Purpose, name: impl Into<String>, shape: &[usize], size: usize) {
        self.add_pieces(purpose, name, shape, size, 1);
    }

    /// The same for one that consists of several pieces of memory of the same size: if there is more than one,
    /// their number is the first of the shape.
    pub fn add_pieces(
        &mut self,
        purpose: Purpose,
        name: impl Into<String>,
        shape: &[usize],
        size: usize,
        pieces: usize,
    ) {
        // A plan that no machine can hold is still a plan: it says that it does not fit.
        let bytes = shape.iter().fold(size as u64, |bytes, &n| bytes.saturating_mul(n as u64));
        self.entries.push(Planned { purpose, name: name.into(), shape: shape.to_vec(), bytes, pieces });
    }

    /// Adds one more piece of memory: to the entry of this purpose, name and shape, if there is one. Pieces
    /// without elements are no entry.
    pub(crate) fn add_piece(
        &mut self,
        purpose: Purpose,
        name: impl Into<String>,
        shape: &[usize],
        size: usize,
    ) {
        if shape.contains(&0) {
            return;
        }
        let name = name.into();
        let same = |e: &&mut Planned| e.purpose == purpose && e.name == name && e.piece() == shape;
        match self.entries.iter_mut().find(same) {
            None => self.add(purpose, name, shape, size),
            Some(entry) => {
                let (pieces, bytes) = (entry.pieces + 1, entry.bytes / entry.pieces as u64);
                entry.shape = [&[pieces], shape].concat();
                entry.bytes = bytes.saturating_mul(pieces as u64);
                entry.pieces = pieces;
            }
        }
    }

    /// Adds all buffers of another plan.
    pub fn extend(&mut self, other: MemoryPlan) {
        self.entries.extend(other.entries);
    }

    /// All buffers, in the order they were added.
    pub fn entries(&self) -> &[Planned] {
        &self.entries
    }

    /// Bytes in all.
    pub fn total(&self) -> u64 {
        saturating_sum(&self.entries)
    }

    /// Bytes per purpose, for those that have any.
    pub fn totals(&self) -> Vec<(Purpose, u64)> {
        let mut purposes: Vec<Purpose> = self.entries.iter().map(|e| e.purpose).collect();
        purposes.sort_unstable();
        purposes.dedup();
        let of = |p: Purpose| saturating_sum(self.entries.iter().filter(|e| e.purpose == p));
        purposes.into_iter().map(|p| (p, of(p))).collect()
    }

    /// Fails unless the plan fits into this memory; names the largest buffers.
    pub fn check(&self, room: impl Into<Room>) -> Result<()> {
        let room = room.into();
        if room.holds(self) {
            return Ok(());
        }
        let mut largest: Vec<&Planned> = self.entries.iter().collect();
        largest.sort_by_key(|e| std::cmp::Reverse(e.bytes));
        let named: Vec<String> = largest
            .iter()
            .take(3)
            .map(|e| format!("{} {:?} ({})", e.name, e.shape, human_bytes(e.bytes)))
            .collect();
        let of = match room {
            Room::Host(_) => String::new(),
            Room::Device { free, .. } => format!(" of {} that are free on the device", human_bytes(free)),
        };
        let why = format!(
            "this job needs {}, {} are available{of}; its largest buffers: {}",
            human_bytes(room.taken(self)),
            human_bytes(room.available()),
            named.join(", ")
        );
        Err(Error::invalid("memory plan", why))
    }
}

fn saturating_sum<'a>(entries: impl IntoIterator<Item = &'a Planned>) -> u64 {
    entries.into_iter().fold(0, |sum, entry| sum.saturating_add(entry.bytes))
}

impl fmt::Display for MemoryPlan {
    /// A table of all buffers, then the totals per purpose.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<[String; 4]> = self
            .entries
            .iter()
            .map(|e| {
                let shape: Vec<String> = e.shape.iter().map(usize::to_string).collect();
                [e.purpose.name().into(), e.name.clone(), shape.join(" x "), human_bytes(e.bytes)]
            })
            .collect();
        let widest = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
        let widths = [widest(0).max(14), widest(1), widest(2), widest(3).max(9)];
        for [purpose, name, shape, bytes] in &rows {
            let [w0, w1, w2, w3] = widths;
            writeln!(f, "{purpose:w0$}  {name:w1$}  {shape:>w2$}  {bytes:>w3$}")?;
        }
        let left = widths[0] + widths[1] + widths[2] + 4;
        for (purpose, bytes) in self.totals() {
            writeln!(f, "{:left$}  {:>w$}", purpose.name(), human_bytes(bytes), w = widths[3])?;
        }
        write!(f, "{:left$}  {:>w$}", "in all", human_bytes(self.total()), w = widths[3])
    }
}

/// Bytes as a person reads them: `3.50 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    for unit in ["KiB", "MiB", "GiB"] {
        value /= 1024.0;
        // What would round to 1024 is shown in the next unit.
        if value < 1023.995 {
            return format!("{value:.2} {unit}");
        }
    }
    format!("{:.2} TiB", value / 1024.0)
}

/// Bytes of main memory that a new program can have without swapping: what the machine has
/// left, or what this process's control group (a container, a SLURM job) leaves of its limit.
pub fn available_memory() -> Result<u64> {
    let path = Path::new("/proc/meminfo");
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let machine =
        available_in(&text).ok_or_else(|| Error::file(path, "there is no line `MemAvailable: … kB`"))?;
    Ok(memory_limit().map_or(machine, |limit| machine.min(limit.left())))
}

fn available_in(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|k| k * 1024)
}

/// What a control group may use, and uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// Bytes that all its processes may use together.
    pub limit: u64,
    /// Bytes that they use, without file contents that the system can drop.
    pub used: u64,
}

impl MemoryLimit {
    /// Bytes that are left.
    pub fn left(self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

/// The tightest memory limit of the control groups that this process is in, if there is one.
pub fn memory_limit() -> Option<MemoryLimit> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let all = group_dirs(&groups, Path::new("/sys/fs/cgroup"));
    all.iter().filter_map(|dir| limit_of(dir)).min_by_key(|limit| limit.left())
}

/// The memory directories of a process's groups and of the groups above them. Within a
/// container the path that the kernel gives may not be there; the root is then the group's own.
fn group_dirs(groups: &str, root: &Path) -> Vec<PathBuf> {
    let mut dirs = vec![];
    for line in groups.lines() {
        // hierarchy:controllers:path; version 2 has no controllers.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let top = match controllers {
            "" => root.to_owned(),
            list if list.split(',').any(|c| c == "memory") => root.join("memory"),
            _ => continue,
        };
        let group = top.join(path.trim_start_matches('/'));
        dirs.extend(group.ancestors().take_while(|dir| dir.starts_with(&top)).map(Path::to_owned));
    }
    dirs
}

fn limit_of(dir: &Path) -> Option<MemoryLimit> {
    let number =
        |name: &str| -> Option<u64> { std::fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok() };
    // `max`, which is no number, is no limit; in version 1 that is a number beyond all memory.
    let limit = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
    let used = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
    let stat = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let droppable = |name: &str| -> Option<u64> {
        stat.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
    };
    let cached = droppable("total_inactive_file").or_else(|| droppable("inactive_file")).unwrap_or(0);
    Some(MemoryLimit { limit, used: used.saturating_sub(cached) }).filter(|found| found.limit < 1 << 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> MemoryPlan {
        let mut plan = MemoryPlan::new();
        plan.add(Purpose::Frozen, "embeddings", &[1000, 64], 4);
        plan.add(Purpose::Activations, "q", &[5, 64], 4);
        let mut other = MemoryPlan::new();
        other.add(Purpose::Frozen, "head", &[3], 2);
        plan.extend(other);
        plan
    }

    #[test]
    fn totals_are_per_purpose() {
        assert_eq!(plan().total(), 256_000 + 1280 + 6);
        assert_eq!(plan().totals(), [(Purpose::Frozen, 256_006), (Purpose::Activations, 1280)]);
        let text = plan().to_string();
        for say in ["embeddings", "1000 x 64", "250.00 KiB", "1.25 KiB", "in all"] {
            assert!(text.contains(say), "{text}");
        }
        let lengths: Vec<usize> = text.lines().map(|l| l.chars().count()).collect();
        assert!(lengths.iter().all(|&l| l == lengths[0]), "{text}");
    }

    #[test]
    fn plans_that_do_not_fit_name_the_largest_buffer() {
        plan().check(257_286).unwrap();
        let message = plan().check(257_285).unwrap_err().to_string();
        assert!(message.contains("embeddings [1000, 64]") && message.contains("251.26 KiB"), "{message}");
    }

    /// As measured on an H100: buffers of 128.25, 128.25 and 128 MiB take 388 MiB, and small ones beside them none.
    #[test]
    fn a_device_gives_out_pages_and_keeps_a_margin() {
        let mut plan = MemoryPlan::new();
        let device = Room::Device { free: 80 << 30, group: false };
        for cols in [8208, 8208, 8192] {
            plan.add(Purpose::Activations, "matrix", &[8192, cols], 2);
        }
        assert_eq!(device.taken(&plan), 388 << 20);
        plan.add_pieces(Purpose::Activations, "small", &[100, 10_000], 2, 100);
        assert_eq!(device.taken(&plan), 390 << 20, "100 pieces of 20,000 bytes share a page");
        plan.add_pieces(Purpose::Activations, "larger", &[3, 600 << 10], 2, 3);
        assert_eq!(device.taken(&plan), 396 << 20, "three pieces of 1.2 MiB do not");
        assert_eq!(Room::Host(0).taken(&plan), plan.total());
        let group = Room::Device { free: 80 << 30, group: true };
        assert_eq!(device.available(), (80 << 30) / 32 * 31 - (1 << 30));
        assert_eq!(device.available() - group.available(), 3 << 29);
        assert_eq!(Room::Device { free: 100, group: true }.available(), 0);
        let room = |mebibytes: u64| Room::Device { free: mebibytes << 20, group: false };
        let message = plan.check(room(1400)).unwrap_err().to_string();
        assert!(message.contains("396.00 MiB") && message.contains("1.37 GiB that are free"), "{message}");
        plan.check(room(1600)).unwrap();
    }

    #[test]
    fn sizes_read_well_and_memory_is_found() {
        let sizes = [0, 1023, 1024, 1_048_575, 3_758_096_384, 1 << 50];
        let want = ["0 B", "1023 B", "1.00 KiB", "1.00 MiB", "3.50 GiB", "1024.00 TiB"];
        assert_eq!(sizes.map(human_bytes), want);
        assert_eq!(available_in("MemTotal: 9 kB\nMemAvailable:   2 kB\n"), Some(2048));
        assert_eq!(available_in("MemTotal: 9 kB\n"), None);
        assert!(available_memory().unwrap() > 1 << 20);
    }

    #[test]
    fn cgroup_limits_are_found_in_both_versions() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let limits = |groups: &str| -> Vec<MemoryLimit> {
            group_dirs(groups, root.path()).iter().filter_map(|dir| limit_of(dir)).collect()
        };
        write("job/step/memory.max", "max\n");
        write("job/step/memory.current", "5\n");
        write("job/memory.max", "1000\n");
        write("job/memory.current", "700\n");
        write("job/memory.stat", "anon 1\ninactive_file 300\n");
        let found = limits("0::/job/step\n");
        assert_eq!(found, [MemoryLimit { limit: 1000, used: 400 }]);
        assert_eq!(found[0].left(), 600);
        write("memory/a/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/a/memory.usage_in_bytes", "1\n");
        write("memory/memory.limit_in_bytes", "50\n");
        write("memory/memory.usage_in_bytes", "60\n");
        let found = limits("4:memory:/a\n3:cpu:/a\n");
        assert_eq!(found, [MemoryLimit { limit: 50, used: 60 }]);
        assert_eq!(found[0].left(), 0);
        assert!(limits("3:cpu:/a\n").is_empty());
    }
}
