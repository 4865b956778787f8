//! A full disk at every request for disk space in turn: making, opening and growing a pool, new runs, large objects,
//! records too large for the log, holes of a copy. Each request that is refused is an error, leaves everything as it was,
//! and succeeds when it is made again.

use std::fs;
use std::path::Path;

use super::crash::Folder;
use super::trace::FAIL_BACK;
use super::*;
use crate::base::error::{Error, Result};

type Page = [u64; 512];
type Large = [u64; 20_000];

/// What the pool is to hold.
#[derive(Debug, Default, PartialEq)]
struct Model {
    numbers: Vec<u64>,
    pages: usize,
    large: Option<u64>,
}

fn model(pool: &PersistentPool) -> Model {
    pool.read(|r| {
        let mut found = Model::default();
        if let Ok(numbers) = r.root_handle::<PVec<u64>>("numbers") {
            found.numbers = numbers.as_slice(r)?.to_vec();
        }
        r.for_each::<Page>(|_, page| {
            assert_eq!(*page, [page[0]; 512]);
            found.pages += 1;
            true
        })?;
        if let Ok(large) = r.root::<Large>("large") {
            assert_eq!(*large, [large[0]; 20_000]);
            found.large = Some(large[0]);
        }
        Ok(found)
    })
    .unwrap()
}

/// A change of the pool, and of the model.
type Step = (fn(&PersistentPool) -> Result<()>, fn(&mut Model));

const STEPS: &[Step] = &[
    (
        |pool| {
            pool.transaction(|tx| {
                let numbers = PVec::<u64>::new(tx)?;
                numbers.push(tx, 1)?;
                tx.set_root("numbers", &numbers)
            })
        },
        |model| model.numbers.push(1),
    ),
    (
        |pool| pool.transaction(|tx| (0..40u64).try_for_each(|n| tx.alloc([n; 512]).map(drop))),
        |model| {
            model.pages += 40;
        },
    ),
    (
        |pool| {
            pool.transaction(|tx| {
                let mut large = tx.reserve::<Large>()?;
                large.write([7; 20_000]);
                let large = tx.publish(large)?;
                tx.set_root("large", &large)
            })
        },
        |model| model.large = Some(7),
    ),
    // The record needs a block of its own.
    (
        |pool| pool.transaction(|tx| tx.root_mut::<Large>("large").map(|mut large| *large = [8; 20_000])),
        |model| {
            model.large = Some(8);
        },
    ),
    (
        |pool| {
            pool.transaction(|tx| {
                tx.root_handle::<PVec<u64>>("numbers")?.extend_from_slice(tx, &[2; 5000])?;
                tx.free(tx.root_handle::<PBox<Large>>("large")?)?;
                tx.remove_root("large")
            })
        },
        |model| {
            model.numbers.extend([2; 5000]);
            model.large = None;
        },
    ),
    (|pool| pool.grow(1 << 20), |_| {}),
    (|pool| pool.trim(0).map(drop), |_| {}),
    (
        |pool| pool.transaction(|tx| (0..200u64).try_for_each(|n| tx.alloc([n; 512]).map(drop))),
        |model| {
            model.pages += 200;
        },
    ),
];

fn is_full(error: &Error) -> bool {
    matches!(error, Error::OutOfMemory { .. })
}

/// Runs a request again where it is refused, which happens once at most.
fn persist<R>(mut request: impl FnMut() -> Result<R>, after_refusal: impl FnOnce()) -> R {
    request()
        .or_else(|error| {
            assert!(is_full(&error), "{error}");
            after_refusal();
            request()
        })
        .unwrap()
}

/// All of it, with the request of that number refused. Whether there were so many.
fn run(path: &Path, refused: i64, durability: Durability) -> bool {
    let config = PersistentConfig::new(1 << 20).layout("faults").durability(durability);
    FAIL_BACK.set(refused);
    let pool = persist(|| PersistentPool::create(path, config.clone()), || assert!(!path.exists()));
    let mut expected = Model::default();
    for (step, change) in STEPS {
        persist(|| step(&pool), || assert_eq!(model(&pool), expected));
        change(&mut expected);
        assert_eq!(model(&pool), expected);
    }
    pool.close().unwrap();
    // A copy whose zeros are holes gets its disk space when it is opened, and when it is written to.
    let bytes = fs::read(path).unwrap();
    let copy = path.with_extension("copy");
    let file = fs::File::create_new(&copy).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (i, piece) in bytes.chunks(4096).enumerate().filter(|(_, piece)| piece.iter().any(|&byte| byte != 0))
    {
        std::os::unix::fs::FileExt::write_all_at(&file, piece, i as u64 * 4096).unwrap();
    }
    drop(file);
    let whole = fs::read(&copy).unwrap();
    let pool = persist(
        || PersistentPool::open(&copy, "faults"),
        || assert!(fs::read(&copy).unwrap() == whole, "a refused opening wrote"),
    );
    assert_eq!(model(&pool), expected);
    persist(|| pool.transaction(|tx| tx.alloc([5u64; 512]).map(drop)), || assert_eq!(model(&pool), expected));
    let left = pool.inner.media.trace.fail_back.load(core::sync::atomic::Ordering::Relaxed);
    pool.close().unwrap();
    FAIL_BACK.set(-1);
    for path in [path, &copy] {
        let report = check(path).unwrap();
        assert!(report.is_whole(), "request {refused}: {report}");
        fs::remove_file(path).unwrap();
    }
    left < 0
}

#[test]
fn a_disk_that_is_full_at_any_request_costs_nothing() {
    let folder = Folder::new("requests");
    for durability in [Durability::ProcessCrash, Durability::Power] {
        let most = (0..).find(|&refused| !run(&folder.0.join("pool"), refused, durability)).unwrap();
        assert!(most > 15, "{most} requests");
    }
}
