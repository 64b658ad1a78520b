//! Whether the program got rights by being executed that its caller does not have, as a set-uid program does: then its
//! environment comes from the caller, and is not to be trusted.

use nix::unistd::{getresgid, getresuid};
use rustix::thread::{CapabilitySet, capabilities, capability_is_in_ambient_set};

/// The entry of the auxiliary vector by which the kernel says so: AT_SECURE.
const SECURE: usize = 23;

pub(crate) fn has_callers_environment() -> bool {
    // Not every process may read its vector: of those for which AT_SECURE is set, only root's may.
    let said = std::fs::read("/proc/self/auxv").ok().and_then(|vector| is_secure(&vector));
    said.unwrap_or_else(|| has_other_ids() || has_capabilities_of_its_file())
}

#[expect(clippy::host_endian_bytes, reason = "the kernel writes the vector for this machine")]
fn is_secure(vector: &[u8]) -> Option<bool> {
    let (words, _) = vector.as_chunks();
    let (entries, _) = words.as_chunks();
    let word = |bytes: &[u8; size_of::<usize>()]| usize::from_ne_bytes(*bytes);
    entries.iter().find(|[kind, _]| word(kind) == SECURE).map(|[_, value]| word(value) != 0)
}

/// If the ids cannot be read, they count as different.
fn has_other_ids() -> bool {
    let users = getresuid().is_ok_and(|ids| ids.real == ids.effective && ids.real == ids.saved);
    let groups = getresgid().is_ok_and(|ids| ids.real == ids.effective && ids.real == ids.saved);
    !(users && groups)
}

/// Whether there are capabilities that its file has given it. Root has all of them anyway, and those in the ambient set come
/// from the caller.
fn has_capabilities_of_its_file() -> bool {
    let is_root = getresuid().is_ok_and(|ids| ids.real.is_root());
    let permitted = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted);
    let is_ambient = |capability| capability_is_in_ambient_set(capability).unwrap_or(false);
    !is_root
        && (0..u64::BITS)
            .map(|bit| CapabilitySet::from_bits_retain(1 << bit))
            .any(|capability| permitted.contains(capability) && !is_ambient(capability))
}
