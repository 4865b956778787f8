//! Configurations from the environment: one variable a field.

use super::config::{AllocatorType, DebugConfig, OnFinding, PoolConfig, Strategy, SyncType};
use super::error::{Error, Result};

/// Where values come from; tests use a table.
type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A value that is one of a few words.
macro_rules! words {
    ($variable:expr, $text:expr, { $($word:literal => $value:expr),* $(,)? }) => {
        match $text {
            $($word => Ok($value),)*
            _ => Err(Error::config($variable, $text, concat!("one of:" $(, " ", $word)*))),
        }
    };
}

/// `4096`, `64K`, `512M`, `2G` (powers of 1024; `KiB` or `KB` are the same), or `unlimited`. Allocates nothing.
pub(crate) fn parse_bytes(text: &str) -> Option<usize> {
    if text.eq_ignore_ascii_case("unlimited") {
        return Some(usize::MAX);
    }
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits);
    let units = [("", 0), ("b", 0), ("k", 10), ("m", 20), ("g", 30), ("t", 40)];
    let shift = units.iter().find_map(|&(name, shift)| {
        let rest = unit.get(name.len()..).filter(|_| unit[..name.len()].eq_ignore_ascii_case(name))?;
        let is_unit = rest.is_empty()
            || shift > 0 && ["b", "ib"].iter().any(|ending| rest.eq_ignore_ascii_case(ending));
        is_unit.then_some(shift)
    })?;
    digits.parse::<usize>().ok()?.checked_mul(1 << shift)
}

fn bytes(variable: &'static str, text: &str) -> Result<usize> {
    parse_bytes(text)
        .ok_or_else(|| Error::config(variable, text, "bytes: 4096, 64K, 512M, 2G or \"unlimited\""))
}

fn boolean(variable: &'static str, text: &str) -> Result<bool> {
    words!(variable, text, {
        "true" => true, "false" => false, "1" => true, "0" => false, "on" => true, "off" => false,
        "yes" => true, "no" => false,
    })
}

/// `off`, `full`, or a list: `canary=32,fill,quarantine=4M,guard_pages,stacks,history=100,leaks,latency`.
fn debug(variable: &'static str, text: &str, on_finding: OnFinding) -> Result<DebugConfig> {
    const ALLOWED: &str = "\"off\", \"full\" or a list of canary, fill, quarantine, guard_pages, stacks, history, \
                           leaks, latency; canary=BYTES, quarantine=BYTES, history=COUNT";
    let mut debug = match text {
        "off" | "false" | "0" => DebugConfig::OFF,
        "full" | "true" | "1" | "on" => DebugConfig::FULL,
        list => {
            let mut debug = DebugConfig::OFF;
            for item in list.split(',') {
                let (name, value) = match item.split_once('=') {
                    Some((name, value)) => (name.trim(), Some(value.trim())),
                    None => (item.trim(), None),
                };
                let amount = |default| value.map_or(Ok(default), |value| bytes(variable, value));
                match (name, value) {
                    ("canary", _) => debug.canary = amount(DebugConfig::FULL.canary)?,
                    ("quarantine", _) => debug.quarantine = amount(DebugConfig::FULL.quarantine)?,
                    ("history", _) => debug.history = amount(DebugConfig::FULL.history)?,
                    ("fill", None) => debug.fill = true,
                    ("guard_pages", None) => debug.guard_pages = true,
                    ("stacks", None) => debug.stacks = true,
                    ("leaks", None) => debug.leaks = true,
                    ("latency", None) => debug.latency = true,
                    _ => return Err(Error::config(variable, item, ALLOWED)),
                }
            }
            debug
        }
    };
    debug.on_finding = on_finding;
    Ok(debug)
}

/// One set of variables: those of host pools, or those of GPU pools.
struct Reader<'a> {
    gpu: bool,
    lookup: Lookup<'a>,
}

/// The whole name of a variable.
macro_rules! variable {
    ($reader:expr, $name:literal) => {
        if $reader.gpu { concat!("MEMORY_POOL_GPU_", $name) } else { concat!("MEMORY_POOL_", $name) }
    };
}

impl Reader<'_> {
    /// Sets `field` where the variable is there.
    fn read<T>(
        &self,
        variable: &'static str,
        field: &mut T,
        parse: impl Fn(&'static str, &str) -> Result<T>,
    ) -> Result<()> {
        if let Some(text) = (self.lookup)(variable) {
            *field = parse(variable, text.trim())?;
        }
        Ok(())
    }

    fn apply(&self, mut config: PoolConfig) -> Result<PoolConfig> {
        let c = &mut config;
        self.read(variable!(self, "ALLOCATOR_TYPE"), &mut c.allocator_type, |variable, text| {
            words!(variable, text, {
                "fixed_size" => AllocatorType::FixedSize,
                "variable_size" => AllocatorType::VariableSize,
                "size_class" => AllocatorType::SizeClass,
            })
        })?;
        self.read(variable!(self, "STRATEGY"), &mut c.strategy, |variable, text| {
            words!(variable, text, {
                "segregated" => Strategy::Segregated,
                "best_fit" => Strategy::BestFit,
                "first_fit" => Strategy::FirstFit,
            })
        })?;
        self.read(variable!(self, "SYNC_TYPE"), &mut c.sync_type, |variable, text| {
            words!(variable, text, {
                "mutex" => SyncType::Mutex,
                "lock_free" => SyncType::LockFree,
                "thread_cached" => SyncType::ThreadCached,
            })
        })?;
        self.read(variable!(self, "INITIAL_SIZE"), &mut c.initial_size, bytes)?;
        self.read(variable!(self, "BLOCK_SIZE"), &mut c.block_size, bytes)?;
        self.read(variable!(self, "ALIGNMENT"), &mut c.alignment, bytes)?;
        self.read(variable!(self, "MAX_SIZE"), &mut c.max_size, bytes)?;
        self.read(variable!(self, "MIN_BLOCK_SIZE"), &mut c.min_block_size, bytes)?;
        self.read(variable!(self, "GROWTH_FACTOR"), &mut c.growth_factor, |variable, text| {
            text.parse().map_err(|_| Error::config(variable, text, "a number from 1.0 to 16.0"))
        })?;
        self.read(variable!(self, "DEVICE_ID"), &mut c.device_id, |variable, text| {
            text.parse().map_err(|_| Error::config(variable, text, "the number of a device, from 0"))
        })?;
        self.read(variable!(self, "THREAD_SAFE"), &mut c.thread_safe, boolean)?;
        self.read(variable!(self, "TRACK_STATS"), &mut c.track_stats, boolean)?;
        self.read(variable!(self, "USE_PINNED_MEMORY"), &mut c.use_pinned_memory, boolean)?;
        self.read(variable!(self, "USE_MANAGED_MEMORY"), &mut c.use_managed_memory, boolean)?;
        self.read(variable!(self, "STREAM_ORDERED"), &mut c.stream_ordered, boolean)?;
        self.read(variable!(self, "PATH"), &mut c.path, |_, text| Ok(Some(text.into())))?;
        let on_finding = c.debug.on_finding;
        self.read(variable!(self, "DEBUG"), &mut c.debug, |variable, text| {
            debug(variable, text, on_finding)
        })?;
        self.read(variable!(self, "ON_FINDING"), &mut c.debug.on_finding, |variable, text| {
            words!(variable, text, {
                "report" => OnFinding::Report,
                "panic" => OnFinding::Panic,
                "abort" => OnFinding::Abort,
                "collect" => OnFinding::Collect,
            })
        })?;
        config.validate()?;
        Ok(config)
    }
}

/// A variable of the process. What is no text is taken with its odd parts replaced, so that parsing says no.
fn process(variable: &str) -> Option<String> {
    std::env::var_os(variable).map(|text| text.to_string_lossy().into_owned())
}

impl PoolConfig {
    /// [`default_cpu`](Self::default_cpu) with what the environment says: one variable a field.
    ///
    /// | variable | values |
    /// |---|---|
    /// | `MEMORY_POOL_ALLOCATOR_TYPE` | `fixed_size`, `variable_size`, `size_class` |
    /// | `MEMORY_POOL_STRATEGY` | `segregated`, `best_fit`, `first_fit` |
    /// | `MEMORY_POOL_SYNC_TYPE` | `mutex`, `lock_free`, `thread_cached` |
    /// | `MEMORY_POOL_INITIAL_SIZE`, `…_BLOCK_SIZE`, `…_ALIGNMENT`, `…_MAX_SIZE`, `…_MIN_BLOCK_SIZE` | `4096`, `64K`, `512M`, `2G`, `unlimited` |
    /// | `MEMORY_POOL_GROWTH_FACTOR` | `1.0` to `16.0` |
    /// | `MEMORY_POOL_THREAD_SAFE`, `…_TRACK_STATS`, `…_USE_PINNED_MEMORY`, `…_USE_MANAGED_MEMORY`, `…_STREAM_ORDERED` | `true`, `false`, `1`, `0`, `on`, `off`, `yes`, `no` |
    /// | `MEMORY_POOL_DEVICE_ID` | the number of a device |
    /// | `MEMORY_POOL_PATH` | a file |
    /// | `MEMORY_POOL_DEBUG` | `off`, `full`, or a list such as `canary=32,fill,quarantine=4M,guard_pages,stacks,history=100,leaks,latency` |
    /// | `MEMORY_POOL_ON_FINDING` | `report`, `panic`, `abort`, `collect` |
    ///
    /// A value that is none of these is an error that names the variable, the value, and what is allowed.
    ///
    /// ```
    /// use memory_pool::{Error, PoolConfig};
    /// let config = PoolConfig::from_env()?;
    /// let gpu = PoolConfig::default_gpu().with_env_gpu()?; // MEMORY_POOL_GPU_…
    /// # Ok::<(), Error>(())
    /// ```
    pub fn from_env() -> Result<Self> {
        Self::default_cpu().with_env()
    }

    /// This configuration with what the variables `MEMORY_POOL_…` say.
    pub fn with_env(self) -> Result<Self> {
        Reader { gpu: false, lookup: &process }.apply(self)
    }

    /// This configuration with what the variables `MEMORY_POOL_GPU_…` say.
    pub fn with_env_gpu(self) -> Result<Self> {
        Reader { gpu: true, lookup: &process }.apply(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> Result<PoolConfig> {
        let lookup = |name: &str| {
            variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| value.to_string())
        };
        Reader { gpu: false, lookup: &lookup }.apply(PoolConfig::default_cpu())
    }

    #[test]
    fn every_field_has_its_variable() {
        let config = with(&[
            ("MEMORY_POOL_ALLOCATOR_TYPE", "fixed_size"),
            ("MEMORY_POOL_STRATEGY", "best_fit"),
            ("MEMORY_POOL_SYNC_TYPE", "lock_free"),
            ("MEMORY_POOL_INITIAL_SIZE", "64K"),
            ("MEMORY_POOL_BLOCK_SIZE", " 512 "),
            ("MEMORY_POOL_ALIGNMENT", "64"),
            ("MEMORY_POOL_MAX_SIZE", "2GiB"),
            ("MEMORY_POOL_MIN_BLOCK_SIZE", "48B"),
            ("MEMORY_POOL_GROWTH_FACTOR", "1.5"),
            ("MEMORY_POOL_DEVICE_ID", "3"),
            ("MEMORY_POOL_THREAD_SAFE", "no"),
            ("MEMORY_POOL_TRACK_STATS", "off"),
            ("MEMORY_POOL_USE_PINNED_MEMORY", "1"),
            ("MEMORY_POOL_USE_MANAGED_MEMORY", "0"),
            ("MEMORY_POOL_STREAM_ORDERED", "yes"),
            ("MEMORY_POOL_PATH", "/tmp/pool"),
            ("MEMORY_POOL_DEBUG", "canary=32, fill,quarantine=4M,history=7,latency"),
            ("MEMORY_POOL_ON_FINDING", "abort"),
        ])
        .unwrap();
        let mut debug =
            DebugConfig { canary: 32, fill: true, quarantine: 4 << 20, history: 7, ..DebugConfig::OFF };
        (debug.latency, debug.on_finding) = (true, OnFinding::Abort);
        let expected = PoolConfig {
            allocator_type: AllocatorType::FixedSize,
            strategy: Strategy::BestFit,
            initial_size: 64 << 10,
            block_size: 512,
            thread_safe: false,
            sync_type: SyncType::LockFree,
            track_stats: false,
            debug,
            device_id: 3,
            use_pinned_memory: true,
            use_managed_memory: false,
            stream_ordered: true,
            alignment: 64,
            growth_factor: 1.5,
            max_size: 2 << 30,
            min_block_size: 48,
            path: Some("/tmp/pool".into()),
        };
        assert_eq!(config, expected);
        assert_eq!(with(&[]).unwrap(), PoolConfig::default_cpu());
        assert_eq!(with(&[("MEMORY_POOL_MAX_SIZE", "unlimited")]).unwrap().max_size, usize::MAX);
        assert_eq!(with(&[("MEMORY_POOL_DEBUG", "full")]).unwrap().debug, DebugConfig::FULL);
    }

    #[test]
    fn nonsense_is_an_error_that_names_variable_value_and_what_is_allowed() {
        for (variable, value, allowed) in [
            ("MEMORY_POOL_STRATEGY", "bestfit", "best_fit"),
            ("MEMORY_POOL_ALLOCATOR_TYPE", "", "fixed_size"),
            ("MEMORY_POOL_SYNC_TYPE", "spin", "lock_free"),
            ("MEMORY_POOL_MAX_SIZE", "64 monkeys", "512M"),
            ("MEMORY_POOL_INITIAL_SIZE", "-1", "512M"),
            ("MEMORY_POOL_BLOCK_SIZE", "99999999999T", "512M"),
            ("MEMORY_POOL_GROWTH_FACTOR", "two", "1.0 to 16.0"),
            ("MEMORY_POOL_THREAD_SAFE", "maybe", "true"),
            ("MEMORY_POOL_DEVICE_ID", "gpu0", "number"),
            ("MEMORY_POOL_DEBUG", "canaries", "canary"),
            ("MEMORY_POOL_ON_FINDING", "ignore", "abort"),
        ] {
            let error = with(&[(variable, value)]).unwrap_err();
            assert_eq!(error.code(), 301);
            let text = error.to_string();
            assert!([variable, value, allowed].iter().all(|part| text.contains(part)), "{text}");
        }
        // What reads well but cannot be together names the fields.
        let error = with(&[("MEMORY_POOL_SYNC_TYPE", "lock_free")]).unwrap_err().to_string();
        assert!(error.contains("sync_type, allocator_type"), "{error}");
        let error = with(&[("MEMORY_POOL_GROWTH_FACTOR", "99")]).unwrap_err().to_string();
        assert!(error.contains("growth_factor") && error.contains("99"), "{error}");
    }
}
