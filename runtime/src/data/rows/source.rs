//! Opening a file of data: what it is, and how many bytes may come out of it.

use crate::artifact::open_file;
use crate::plan::{available_memory, human_bytes};
use crate::{Error, Result};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Parquet files begin and end with this.
const PARQUET_MAGIC: &[u8] = b"PAR1";
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const ZIP_MAGIC: &[u8] = b"PK\x03\x04";
/// Files of Arrow, and streams of it, begin like this.
const ARROW_MAGIC: [&[u8]; 2] = [b"ARROW1", &[0xff, 0xff, 0xff, 0xff]];
/// Some editors begin files with a byte-order mark.
pub(super) const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();
/// Bytes that are looked at to see what a file is.
const BEGIN: usize = 4096;

/// Rows of a data set may always take this much memory,
const ALWAYS: u64 = 1 << 30;
/// and otherwise this many times the size of its files.
const GROWTH: u64 = 200;

/// The memory that rows may take, so that a small file cannot exhaust the machine.
#[derive(Clone, Debug)]
pub struct Budget {
    allowed: u64,
    used: u64,
    files: u64,
}

impl Budget {
    /// For files of a data set: so many MiB; or, where that is not set, 1 GiB or 200 times the
    /// size of the files, whichever is more, and no more than three quarters of the memory
    /// that is free.
    pub fn of(files: &[impl AsRef<Path>], mebibytes: Option<u64>) -> Self {
        let size = |path: &Path| std::fs::metadata(path).map_or(0, |found| found.len());
        let files = files.iter().map(|path| size(path.as_ref())).sum::<u64>();
        let free = available_memory().map_or(u64::MAX, |bytes| bytes / 4 * 3);
        let automatic = || files.saturating_mul(GROWTH).max(ALWAYS).min(free);
        let allowed = mebibytes.map_or_else(automatic, |mebibytes| mebibytes.saturating_mul(1 << 20));
        Self { allowed, used: 0, files }
    }

    /// Counts bytes that a row of `path` takes.
    pub(super) fn take(&mut self, path: &Path, bytes: u64) -> Result<()> {
        self.used = self.used.saturating_add(bytes);
        match self.used <= self.allowed {
            true => Ok(()),
            false => Err(Error::file(path, too_large(self.allowed, self.files))),
        }
    }
}

fn too_large(allowed: u64, files: u64) -> String {
    format!(
        "its rows take more than {} of memory, from files of {}; data.read_limit_mib sets how much they may take",
        human_bytes(allowed),
        human_bytes(files)
    )
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Parquet,
    Json,
    /// CSV or TSV; the delimiter, where the name decides it.
    Table(Option<u8>),
}

/// An open file of data.
pub(super) struct Source {
    pub path: Arc<PathBuf>,
    pub form: Form,
    /// Its text, without a byte-order mark.
    pub text: Box<dyn BufRead>,
    /// The first bytes of the text.
    pub begin: Vec<u8>,
    /// The name's ending is `json`: one value for the whole file is likely.
    pub named_json: bool,
    /// Bytes that may come out of the file.
    pub allowed: u64,
}

impl Source {
    pub fn open(path: &Path, budget: &Budget) -> Result<Self> {
        let (form, name) =
            (by_name(path), path.file_name().unwrap_or_default().to_string_lossy().to_lowercase());
        let mut file = BufReader::with_capacity(1 << 16, open_file(path)?);
        let packed = peek(&mut file, path)?;
        let allowed = budget.allowed;
        let bounded = |inner: Box<dyn Read>| -> Box<dyn BufRead> {
            Box::new(BufReader::new(Bounded { inner, left: allowed, allowed, files: budget.files }))
        };
        let mut text: Box<dyn BufRead> = if packed.starts_with(GZIP_MAGIC) {
            bounded(Box::new(flate2::bufread::MultiGzDecoder::new(file)))
        } else if packed.starts_with(ZSTD_MAGIC) {
            let decoder = zstd::Decoder::with_buffer(file).map_err(|e| Error::io("read", path, e))?;
            bounded(Box::new(decoder))
        } else if name.ends_with(".gz") || name.ends_with(".zst") {
            return Err(Error::file(
                path,
                "its name says that it is compressed, but it does not begin like that",
            ));
        } else {
            Box::new(file)
        };
        let begin = peek(&mut text, path)?;
        let form = if begin.starts_with(PARQUET_MAGIC) { Form::Parquet } else { form };
        if let Some(why) = unreadable(&begin, form, &name) {
            return Err(Error::file(path, why));
        }
        // Lines of objects stay that under any name.
        let holds_objects = begin.trim_ascii_start().starts_with(b"{");
        let form = if holds_objects && form != Form::Parquet { Form::Json } else { form };
        let named_json = name.trim_end_matches(".gz").trim_end_matches(".zst").ends_with(".json");
        Ok(Self { path: Arc::new(path.to_owned()), form, text, begin, named_json, allowed })
    }
}

/// What the name says that a file is.
fn by_name(path: &Path) -> Form {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let name = name.trim_end_matches(".gz").trim_end_matches(".zst");
    match name.rsplit('.').next() {
        Some("csv") => Form::Table(None),
        Some("tsv") => Form::Table(Some(b'\t')),
        _ => Form::Json,
    }
}

/// Why a file that begins like this cannot be read.
fn unreadable(begin: &[u8], form: Form, name: &str) -> Option<String> {
    let zero_bytes = begin.iter().take(64).filter(|&&byte| byte == 0).count();
    if form == Form::Parquet {
        None
    } else if name.ends_with(".parquet") {
        Some("not a Parquet file: it does not begin with `PAR1`".into())
    } else if ARROW_MAGIC.iter().any(|magic| begin.starts_with(magic)) {
        Some(ARROW.into())
    } else if begin.starts_with(ZIP_MAGIC) {
        Some("this is a ZIP archive or a spreadsheet; unpack it, or export it as CSV".into())
    } else if begin.starts_with(&[0xff, 0xfe]) || begin.starts_with(&[0xfe, 0xff]) || zero_bytes > 2 {
        Some("this is text in UTF-16, or no text; convert it: `iconv -f UTF-16 -t UTF-8 FILE > NEW`".into())
    } else {
        None
    }
}

/// The way out for Arrow files, which are not read.
pub(super) const ARROW: &str = "this is an Arrow file as the `datasets` library stores it, which is not read; \
    write it as Parquet: python -c 'import datasets; datasets.load_from_disk(\"DIR\").to_parquet(\"data.parquet\")', \
    or for one file: datasets.Dataset.from_file(\"FILE.arrow\").to_parquet(\"data.parquet\")";

/// The first bytes, without taking them; a byte-order mark is taken and left out.
fn peek(text: &mut (impl BufRead + ?Sized), path: &Path) -> Result<Vec<u8>> {
    let failed = |e| Error::io("read", path, e);
    let mark = text.fill_buf().map_err(failed)?.starts_with(BYTE_ORDER_MARK);
    if mark {
        text.consume(BYTE_ORDER_MARK.len());
    }
    let found = text.fill_buf().map_err(failed)?;
    Ok(found[..found.len().min(BEGIN)].to_vec())
}

/// A reader of decompressed bytes that ends with an error at a limit.
struct Bounded {
    inner: Box<dyn Read>,
    left: u64,
    allowed: u64,
    files: u64,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        match self.left.checked_sub(count as u64) {
            Some(left) => self.left = left,
            None => return Err(std::io::Error::other(too_large(self.allowed, self.files))),
        }
        Ok(count)
    }
}
