# Answers each line "check N" or "announce N" once it has done that N times.
import sys

from django.conf import settings

settings.configure(
    CACHES={
        'default': {
            'BACKEND': 'django.core.cache.backends.memcached.PyMemcacheCache',
            'LOCATION': f'unix:{sys.argv[1]}',
        },
    },
    INSTALLED_APPS=['django.contrib.contenttypes', 'django.contrib.sites'],
    SECRET_KEY='peers',
    USE_TZ=True,
)

import django

django.setup()

from djblets.cache.synchronizer import GenerationSynchronizer

checked = GenerationSynchronizer('checked', normalize_cache_key=False)
announced = GenerationSynchronizer('announced', normalize_cache_key=False)
if checked.sync_gen is None or checked.is_expired():
    sys.exit('memcached keeps nothing')

operations = {'check': checked.is_expired, 'announce': announced.mark_updated}
print('ready', flush=True)
for line in sys.stdin:
    name, times = line.split()
    operation = operations[name]
    for _ in range(int(times)):
        operation()
    print('done', flush=True)
