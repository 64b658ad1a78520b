//! Values that stay where they are while newer ones are put in front of them; slots, and what keeps them mapped.

use std::ptr::NonNull;
use std::sync::Arc;

use super::Mapping;
use crate::protocol::atomic::{AtomicPtr, Ordering};
use crate::protocol::generation_word::GenerationWord;

/// A slot, together with what keeps it mapped.
#[derive(Debug)]
pub(crate) struct SlotRef<O> {
    slot: NonNull<GenerationWord>,
    owner: Arc<O>,
}

// SAFETY: a shared reference to atomics and an Arc, each of which may go to another thread if the owner may.
unsafe impl<O: Send + Sync> Send for SlotRef<O> {}
// SAFETY: as for Send.
unsafe impl<O: Send + Sync> Sync for SlotRef<O> {}

impl<O: AsRef<Mapping>> SlotRef<O> {
    /// # Panics
    ///
    /// The slot is not in the mapping of `owner`.
    pub(crate) fn new(owner: &Arc<O>, slot: &GenerationWord) -> Self {
        let mapping: &Mapping = owner.as_ref().as_ref();
        assert!(mapping.contains(slot), "a slot of another mapping");
        Self { slot: NonNull::from(slot), owner: Arc::clone(owner) }
    }

    /// The place of a key that has none: its word says that the table has a successor, where the key may be found.
    #[cfg(feature = "map")]
    pub(crate) fn nowhere(owner: &Arc<O>) -> Self {
        static NOWHERE: GenerationWord = GenerationWord::retired();
        Self { slot: NonNull::from(&NOWHERE), owner: Arc::clone(owner) }
    }
}

impl<O> SlotRef<O> {
    pub(crate) fn owner(&self) -> &Arc<O> {
        &self.owner
    }
}

impl<O> Clone for SlotRef<O> {
    fn clone(&self) -> Self {
        Self { slot: self.slot, owner: Arc::clone(&self.owner) }
    }
}

impl<O> std::ops::Deref for SlotRef<O> {
    type Target = GenerationWord;

    #[inline]
    fn deref(&self) -> &GenerationWord {
        // SAFETY: `new` found the slot in the owner's mapping, which this value keeps in place, or it is a static; only its atomics
        // change.
        unsafe { self.slot.as_ref() }
    }
}

/// The slots that a key has had, one in each incarnation of its table; and what else its holder keeps, which a check does not
/// read.
///
/// Two words: the slot, which is all that a check reads, and a pointer to the rest.
#[derive(Debug)]
pub(crate) struct Places<O, C> {
    /// The slot of the latest place, kept here so that a check saves two loads.
    slot: Published<GenerationWord>,
    rest: Box<Rest<O, C>>,
}

#[derive(Debug)]
#[repr(C)]
struct Rest<O, C> {
    places: Chain<SlotRef<O>>,
    cold: C,
}

impl<O, C> Places<O, C> {
    pub(crate) fn new(place: SlotRef<O>, cold: C) -> Self {
        let slot = Published::new(place.slot.as_ptr());
        Self { slot, rest: Box::new(Rest { places: Chain::new(place), cold }) }
    }

    /// What else the holder keeps.
    pub(crate) fn cold(&self) -> &C {
        &self.rest.cold
    }

    #[inline]
    pub(crate) fn slot(&self) -> &GenerationWord {
        // SAFETY: it belongs to a place of the chain, which keeps it mapped as long as self lives.
        unsafe { &*self.slot.get() }
    }

    /// The latest place: slower than [`slot`](Self::slot), as it reads the chain.
    pub(crate) fn latest(&self) -> &SlotRef<O> {
        self.rest.places.latest()
    }

    pub(crate) fn append(&self, place: SlotRef<O>) {
        self.rest.places.append(place);
        loop {
            let latest = self.latest().slot;
            self.slot.set(latest.as_ptr());
            // Two threads may append at once, and the older place must not be the one that stays. Whichever thread sets the
            // slot last sees, in its next load of the chain, every place that was appended before either of them set it, and
            // sets the slot again if there is a newer one.
            if self.latest().slot == latest {
                return;
            }
        }
    }
}

/// A growing sequence of values, whose latest is read with one load. Every value lives as long as the chain, so a reader may
/// keep using the one it has while another thread appends. No lock is taken, so a fork at any time is harmless.
#[derive(Debug)]
pub(crate) struct Chain<T> {
    head: Published<Link<T>>,
    _owns: std::marker::PhantomData<Box<Link<T>>>,
}

#[derive(Debug)]
struct Link<T> {
    value: T,
    previous: *mut Link<T>,
}

// SAFETY: the chain owns its values and gives out shared references to them.
unsafe impl<T: Send + Sync> Send for Chain<T> {}
// SAFETY: as for Send; appending from several threads moves values between them, which Send allows.
unsafe impl<T: Send + Sync> Sync for Chain<T> {}

impl<T> Chain<T> {
    pub(crate) fn new(value: T) -> Self {
        let link = Box::into_raw(Box::new(Link { value, previous: std::ptr::null_mut() }));
        Self { head: Published::new(link), _owns: std::marker::PhantomData }
    }

    #[inline]
    pub(crate) fn latest(&self) -> &T {
        // SAFETY: the head is never null, its target was complete before it was published, and only `drop` frees it.
        unsafe { &(*self.head.get()).value }
    }

    /// The one before the latest.
    pub(crate) fn previous(&self) -> Option<&T> {
        // SAFETY: the head is never null, was complete before it was published, and is freed by `drop` alone. `previous` is
        // null or such a link too, and does not change after its own link was published.
        unsafe { (*self.head.get()).previous.as_ref() }.map(|link| &link.value)
    }

    /// Appends `value` if `latest` is the latest, and drops it otherwise.
    #[cfg(feature = "map")]
    pub(crate) fn append_to(&self, latest: &T, value: T) {
        let head = self.head.get();
        // SAFETY: as in `latest`.
        if !std::ptr::eq(unsafe { &(*head).value }, latest) {
            return;
        }
        let link = Box::into_raw(Box::new(Link { value, previous: head }));
        if !self.head.replace(head, link) {
            // SAFETY: it was made just now, and was not published.
            drop(unsafe { Box::from_raw(link) });
        }
    }

    pub(crate) fn append(&self, value: T) {
        let link = Box::into_raw(Box::new(Link { value, previous: std::ptr::null_mut() }));
        loop {
            let head = self.head.get();
            // SAFETY: the link is this thread's own until it is published.
            unsafe { (*link).previous = head };
            if self.head.replace(head, link) {
                return;
            }
        }
    }
}

impl<T> Drop for Chain<T> {
    fn drop(&mut self) {
        let mut link = self.head.get();
        while !link.is_null() {
            // SAFETY: every link came from a Box and is in the chain once, and nothing borrows from a chain that is being
            // dropped.
            let owned = unsafe { Box::from_raw(link) };
            link = owned.previous;
        }
    }
}

/// A pointer to something that is complete before it is published, and never changes afterwards.
#[derive(Debug)]
pub(crate) struct Published<T>(AtomicPtr<T>);

impl<T> Published<T> {
    pub(crate) fn new(pointer: *mut T) -> Self {
        Self(AtomicPtr::new(pointer))
    }

    #[inline]
    pub(crate) fn get(&self) -> *mut T {
        // ORDERING: acquire pairs with the release in `set` and `replace`: what the pointer leads to was completed before the
        // pointer was stored.
        self.0.load(Ordering::Acquire)
    }

    pub(crate) fn set(&self, new: *mut T) {
        // ORDERING: release pairs with the acquire in `get`: what `new` points to is complete for every thread that loads the
        // pointer. A swap instead of a store, and acquire, which pairs with the release of an earlier `set`: of two threads
        // that set, the second sees all that the first did before, its append to the chain included.
        self.0.swap(new, Ordering::AcqRel);
    }

    pub(crate) fn replace(&self, old: *mut T, new: *mut T) -> bool {
        // ORDERING: release pairs with the acquire in `get`: what `new` points to is complete for every thread that loads the
        // pointer. Acquire pairs with the release of the `replace` or `set` that stored `old`: the thread that takes `old` out,
        // to unmap it or to link to it, sees it complete. Relaxed on failure: the pointer that was found is not used.
        self.0.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}
